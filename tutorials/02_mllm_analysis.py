# %% [markdown]
"""What does the MLLM see, does finetuning teach it, and do its hidden states know more than the prompt?

IMG never reads the MLLM's words: the guidance h is the last hidden states of image and question,
before any answer. But words can be marked, so they are looked at first. Shown:

1. stock MLLM against the finetuned one on triplets that it was not trained on: instructions worded
   exactly, and the decision between an edit and "nothing" (in the paper people judged meaning:
   42.3 % -> 76.3 %);
2. what a linear probe reads out of the features: is this image right for its prompt? Of the text
   embeddings alone, of the stock MLLM, of the finetuned one. Half of the prompts teach the probe,
   the others test it;
3. some images with both answers, and the oracle's.

The probe is logistic regression on what x = [mean of h, last h] becomes after standardising,

    P(right | x) = sigmoid(w x + b),   w, b = argmin  mean loss + (ridge / 2) ||w||^2

and its mark is the area under the ROC curve: how often a right image scores above a wrong one; .5
is chance. The text knows which prompts are hard, which is worth something; but only who has seen
the image can tell two drawings of one prompt apart. So the second mark counts such pairs only.
"""  # noqa: E501

# %% Options
from common import bars, begin, option, picture, save, sheet, step

help_text = "how many prompts the probe is about, each drawn four times"
options, preset = begin(__doc__, oracle=True, prompts=option(250, help_text, least=20, quick=20))

import random
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from img_minimal.backbone import open_backbone
from img_minimal.data.pairs import triplet_stream
from img_minimal.detector import MAX_HELD_OUT, Detector
from img_minimal.evaluate.intervals import bootstrap_ratio, mean_interval, ranking_interval, said
from img_minimal.files import to_pil
from img_minimal.hub.parts import open_guide
from img_minimal.mllm import MLLM, guidance_features, padded
from img_minimal.plots import BLUE, GREY, ORANGE
from img_minimal.tiny.grammar import benchmark
from img_minimal.tiny.oracle import judge

DRAWN = 4  # images of each prompt
models, seed = preset.models, options.seed
MLLMS = {"stock MLLM": models.stock_mllm, "finetuned MLLM": models.mllm}

# %% 1. The exam: both MLLMs write instructions for the triplets that finetuning held out, which are
# the table's last. Both see with the same frozen eyes, so the pictures are encoded once.
exact = {}
with step("exam"):
    [table] = triplet_stream(preset.data.triplets).chunks()
    held_out = table.items[-MAX_HELD_OUT:]
    if options.quick:
        held_out = held_out[:20]
    numbers = [str(k) for k in range(len(held_out))]
    for name, path in MLLMS.items():
        detector = Detector(MLLM.from_pretrained(path))
        grades = detector.grades(held_out, 0, 64)
        exact[name] = mean_interval(np.array(grades["exact"]), numbers)
        decided = mean_interval(np.array(grades["decided"]), numbers)
        always = np.mean(grades["always_edit"])
        print(
            f"{name:15} worded exactly {said(exact[name])},",
            f"edit or nothing decided {said(decided)}",
            f" (n {len(numbers)}; always saying 'edit': {always:.3f})",
        )

# %% 2. Images for the probe: every prompt drawn four times, each from a seed of its own
with step("load"):
    backbone = open_backbone(preset)
    guides = {"text alone": open_guide(models, "text", backbone)}
    for name, path in MLLMS.items():
        guides[name] = open_guide(replace(models, mllm=path), "mllm", backbone)
prompts = benchmark(options.prompts, "validation", seed)
prompts = np.repeat(prompts, DRAWN)
captions = [str(prompt) for prompt in prompts]
count = len(captions)
with step("draw"):
    seeds = range(seed + 1000, seed + 1000 + count)
    images = backbone.draw(captions, list(seeds), progress="images")
pictures = to_pil(images)
verdicts = judge(images, prompts)
right = np.array([verdict.strict for verdict in verdicts])  # what the probe is to find out

# %% 3. Features of the images under their prompts, from each guide: x = [mean of h, last h]
x = {}
with step("look"):
    questions = range(seed, seed + count)
    for name, guide in guides.items():
        look = guidance_features(guide, pictures, captions, questions, progress=name)
        h, mask = padded(*look)
        h = h.float() * mask[..., None]
        lengths = mask.sum(1)
        mean = h.sum(1) / lengths[:, None]
        last = h[torch.arange(count), lengths - 1]
        x[name] = torch.cat([mean, last], dim=1)

# %% 4. The probe learns w and b from half of the prompts
names = sorted(set(captions))
teachers = random.Random(seed).sample(names, len(names) // 2)
teach = np.isin(captions, teachers)


def probe(x: Tensor, ridge: float = 0.01) -> np.ndarray:
    """Learn w and b from the images that teach; score all images: (B, 2 H) -> w x + b, (B,)."""
    x = x.double()
    x = (x - x[teach].mean(0)) / (x[teach].std(0) + 1e-6)
    target = torch.from_numpy(right[teach]).double()
    w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits(x[teach] @ w + b, target)
        value = value + ridge / 2 * w.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (x @ w + b).detach().numpy()


# %% 5. Its marks on the other half: any two images, and two drawings of one prompt
test = np.array(captions)[~teach]
right_test = right[~teach]


def same_prompt(scores: np.ndarray) -> dict[str, float]:
    """Compute the share of pairs, a right and a wrong image of one prompt, in the right order."""
    clusters = sorted(set(test))
    ordered, pairs = [], []
    for caption in clusters:
        here = test == caption
        high, low = scores[here & right_test], scores[here & ~right_test]
        lead = np.sign(np.subtract.outer(high, low))
        ordered.append((1 + lead).sum() / 2)
        pairs.append(float(lead.size))
    return bootstrap_ratio(np.array(ordered), np.array(pairs), clusters)


any_two, one_prompt = {}, {}
print(f"a linear probe for 'right' on unseen prompts, {count} images, {right.mean():.0%} right:")
with step("probe"):
    for name in guides:
        scores = probe(x[name])[~teach]
        any_two[name] = ranking_interval(scores, right_test, test)
        one_prompt[name] = same_prompt(scores)
        print(
            f"{name:15} area under ROC {said(any_two[name])} ;",
            f"between drawings of one prompt {said(one_prompt[name])}",
        )

# %% 6. The picture: the marks, and words about the first wrong images and the first right one
figure, ((words, left, middle), row) = sheet(10, (3.6, [1, 1.3, 1.3]), (4, [1] * 5))
bars(words, exact, color=(ORANGE, BLUE))
words.set(ylim=(0, 1.15), ylabel="instructions right", title="in words")
for axis, marks, title in (
    (left, any_two, "any two images"),
    (middle, one_prompt, "two drawings of one prompt"),
):
    bars(axis, marks, color=(GREY, ORANGE, BLUE))
    axis.axhline(0.5, color="black", ls=":")
    axis.set(ylim=(0.4, 1.05), title=f"in hidden states, by a linear probe:\n{title}")
left.set_ylabel("right image above wrong (.5: chance)")
first = np.arange(count) % DRAWN == 0
shown = [*np.flatnonzero(first & ~right)[:4], *np.flatnonzero(first & right)[:1]]
with step("put in words"):
    for axis, k in zip(row, shown):
        below = ""
        for name in MLLMS:
            [answer] = guides[name].explain([pictures[k]], [captions[k]], [seed + int(k)])
            below += f"{name.split()[0]}: {answer}\n"
        picture(axis, pictures[k], captions[k], f"{below}oracle: {verdicts[k].words}")
caption = (
    f"words: {len(held_out)} held-out triplets; probes: {count} images of {len(names)} "
    "prompts, half of the prompts teach, the others test; images: the first of either kind, not "
    "chosen"
)
save(figure, options, "02_mllm_analysis", caption)
