# %% [markdown]
"""What does the MLLM see, does finetuning teach it, and do its hidden states know more than the prompt?

IMG never reads the MLLM's words: the guidance h is the last hidden states of image and question, before any answer.
But words can be marked, so they are looked at first. Shown:

1. stock MLLM against the finetuned one on triplets that it was not trained on: instructions worded exactly, and the
   decision between an edit and "nothing" (in the paper people judged meaning: 42.3 % -> 76.3 %);
2. what a linear probe reads out of the features: is this image right for its prompt? Of the text embeddings alone, of
   the stock MLLM, of the finetuned one. Half of the prompts teach the probe, it is tested on the others;
3. some images with both answers, and the oracle's.

The probe is logistic regression on what x = [mean of h, last h] becomes after standardising,

    P(right | x) = sigmoid(w x + b),   w, b = argmin  mean loss + (ridge / 2) ||w||^2

and its mark is the area under the ROC curve: how often a right image scores above a wrong one; .5 is chance. The text
knows which prompts are hard, which is worth something; but only who has seen the image can tell two drawings of one
prompt apart. So the second mark counts such pairs only.
"""

# %% Options
from dataclasses import dataclass

from common import Options, begin, check, option, oracle_preset, save, step


@dataclass
class Config(Options):
    """The command line."""

    prompts: int = option(250, "how many prompts the probe is about, each drawn four times")


options = begin(Config, __doc__)
check(options.prompts >= 20, f"--prompts is {options.prompts}, expected 20 or more")

import random

import numpy as np
import torch
from figures import mllm_analysis
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from img_minimal.data.pairs import triplet_stream
from img_minimal.evaluate.intervals import bootstrap_ratio, mean_interval, ranking_interval
from img_minimal.detector import Detector
from img_minimal.detector import HELD_OUT
from img_minimal.load import load_backbone, load_guide
from img_minimal.mllm import MLLM, Guide, guidance_features
from img_minimal.files import to_pil
from img_minimal.tiny.grammar import benchmark
from img_minimal.tiny.oracle import judge

DRAWN = 4  # images of each prompt
preset = oracle_preset(options)

# %% 1. The exam: both MLLMs write instructions for the triplets that finetuning held out, which are the table's last.
# Both see with the same frozen eyes, so that the pictures are looked at once.
marks, examples = {}, []
with step("exam"):
    [table] = triplet_stream(preset.triplets).chunks()
    held_out = table.items[-HELD_OUT:][: 20 if options.quick else None]
    for name, path in (("stock MLLM", preset.stock_mllm), ("finetuned MLLM", preset.mllm)):
        detector = Detector(MLLM.from_pretrained(path))
        examples = examples or detector.encode(held_out, 64)
        marks[name] = {key: np.array(value) for key, value in detector.graded(examples, 0, 64).items()}
for name, part in marks.items():
    each = [str(k) for k in range(len(part["exact"]))]
    exact, decided = (mean_interval(part[key], each) for key in ("exact", "decided"))
    words = "worded exactly {value:.3f} [{low:.3f}, {high:.3f}]".format(**exact)
    words += ", edit or nothing decided {value:.3f} [{low:.3f}, {high:.3f}]".format(**decided)
    print(f"{name:15} {words}  (n {len(each)}; always saying 'edit': {part['always_edit'].mean():.3f})")

# %% 2. Images for the probe: every prompt drawn four times, each from a seed of its own, judged by the oracle
with step("load"):
    backbone = load_backbone(preset)
    guides: dict[str, Guide] = {
        name: load_guide(preset, kind, backbone)
        for name, kind in (("text alone", "text"), ("stock MLLM", "stock"), ("finetuned MLLM", "mllm"))
    }
prompts = benchmark(20 if options.quick else options.prompts, "validation", options.seed)
prompts = [prompt for prompt in prompts for _ in range(DRAWN)]
captions = [str(prompt) for prompt in prompts]
with step("draw"):
    images = backbone.draw(captions, [options.seed + 1000 + k for k in range(len(prompts))], progress="images")
pictures, verdicts = to_pil(images), judge(images, prompts)
right = np.array([verdict.strict for verdict in verdicts])  # what the probe is to find out

# %% 3. Features of the images under their prompts, from each guide: x = [mean of h, last h]
x: dict[str, Tensor] = {}
with step("look"):
    for name, guide in guides.items():
        seeds = range(options.seed, options.seed + len(captions))
        h, mask = guidance_features(guide, pictures, captions, seeds, progress=name)
        h, count = h.float() * mask[..., None], mask.sum(1)
        x[name] = torch.cat([h.sum(1) / count[:, None], h[torch.arange(len(h)), count - 1]], dim=1)

# %% 4. The probe learns w and b from half of the prompts
names = sorted(set(captions))
teachers = set(random.Random(options.seed).sample(names, len(names) // 2))
teach = np.array([caption in teachers for caption in captions])


def probe(x: Tensor, ridge: float = 0.01) -> np.ndarray:
    """Scores w x + b of all images (B,), with w and b from those that teach."""
    x = x.double()
    x = (x - x[teach].mean(0)) / (x[teach].std(0) + 1e-6)
    target = torch.tensor(right[teach], dtype=torch.float64)
    w, b = torch.zeros(x.shape[1], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    optimizer = torch.optim.LBFGS([w.requires_grad_(), b.requires_grad_()], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits((x @ w + b)[teach], target) + ridge / 2 * w.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (x @ w + b).detach().numpy()


# %% 5. Its marks on the other half: any two images, and two drawings of one prompt, of which one is right
test = [caption for caption, teaches in zip(captions, teach) if not teaches]


def same_prompt(scores: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """The share of pairs, one right and one wrong image of one prompt, that the scores order correctly."""
    won, pairs, clusters = [], [], sorted(set(test))
    for caption in clusters:
        here = np.array([c == caption for c in test])
        high, low = scores[here & right][:, None], scores[here & ~right][None]
        won.append(((high > low) + 0.5 * (high == low)).sum())
        pairs.append(high.size * low.size)
    return bootstrap_ratio(np.array(won, float), np.array(pairs, float), clusters)


found = {}
print(f"a linear probe for 'right' on unseen prompts, {len(captions)} images, {right.mean():.0%} right:")
with step("probe"):
    for name in guides:
        scores = probe(x[name])[~teach]
        found[name] = area, pairs = (
            ranking_interval(scores, right[~teach], test), same_prompt(scores, right[~teach]),
        )  # fmt: skip
        print(f"{name:15} area under ROC {{value:.3f}} [{{low:.3f}}, {{high:.3f}}]".format(**area),
              "; between drawings of one prompt {value:.3f} [{low:.3f}, {high:.3f}]".format(**pairs))  # fmt: skip

# %% 6. In words: the first wrong images and the first right one, not chosen
firsts = range(0, len(captions), DRAWN)
shown = [k for k in firsts if not right[k]][: mllm_analysis.SHOWN - 1] + [k for k in firsts if right[k]][:1]
with step("put in words"):
    said = {
        name: guides[name].explain(
            [pictures[k] for k in shown], [captions[k] for k in shown], [options.seed + k for k in shown]
        )
        for name in ("stock MLLM", "finetuned MLLM")
    }
answers = [
    (pictures[k], captions[k], {"stock": stock, "finetuned": ours, "oracle": verdicts[k].words})
    for k, stock, ours in zip(shown, *said.values())
]

# %% 7. The picture
caption = (
    f"{preset.name}, --seed {options.seed}; words: {len(marks['stock MLLM']['exact'])} held-out triplets; probes: "
    f"{len(captions)} images of {len(set(captions))} prompts,\nhalf of the prompts teach, the others test; images: the "
    "first of either kind, not chosen"
)
save(mllm_analysis.draw(marks, found, answers), options, "02_mllm_analysis", caption)
