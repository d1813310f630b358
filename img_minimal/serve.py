"""`python sample.py --serve`: a page in the browser for IMG, with the standard interface of Gradio.

Gradio is no requirement; `pip install gradio` before. The page is bound to 127.0.0.1: nobody else can reach it.
"""

from PIL.Image import Image

from img_minimal.pipeline import IMG
from img_minimal.runtime.errors import UserError


def page(img: IMG, title: str, examples: list[str]) -> object:
    """A Gradio page: prompt and seed, the first picture, what the MLLM says of it, the picture drawn again.

    Raises UserError if Gradio is not installed.
    """
    try:
        import gradio
    except ImportError:
        raise UserError("--serve needs the package gradio: pip install gradio") from None

    def draw(prompt: str, seed: float) -> tuple[Image, str, Image]:
        """What a press of the button does; a prompt that cannot be drawn is said on the page."""
        try:
            out = img(prompt, seed=int(seed))
        except (UserError, ValueError) as error:
            raise gradio.Error(str(error)) from None
        return out.initial[0], out.said[0], out.images[0]

    return gradio.Interface(
        draw,
        inputs=[gradio.Textbox(examples[0], label="prompt"), gradio.Number(0, label="seed", precision=0)],
        outputs=[
            gradio.Image(label="first picture"),
            gradio.Textbox(label="what the MLLM says"),
            gradio.Image(label="drawn again"),
        ],
        examples=[[example, 0] for example in examples],
        title=title,
        description="Draw, look, align, draw again from the same prompt and seed.",
        flagging_mode="never",
        cache_examples=False,
    )


def serve(img: IMG, title: str, examples: list[str]) -> None:
    """Open the page until the program is stopped."""
    page(img, title, examples).launch(server_name="127.0.0.1", inbrowser=True)
