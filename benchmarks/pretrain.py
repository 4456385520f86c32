"""Train the embedded CLIP model from nothing but packages on PyPI, and save it.

    pip install '.[demo]' && pip install $(python benchmarks/pretrain.py --list-fonts)
    python benchmarks/pretrain.py --out clip

Pictures are drawn and captioned procedurally: coloured shapes, counts, textures, letters, printed
digits and words. No photograph, no handwritten digit and no picture of a task's split is among
them, and no font file of a validation or test split (Roboto, a relative of the test split's Roboto
Mono, is). The loss is contrastive with several positives: every caption of the batch that is true
of a picture counts as right for it. An hour on two cores.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import json
import math
import multiprocessing
import random
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from weightops.tasks import drawing, masks
from weightops.tasks.fonts import STYLES, Face, faces
from weightops.tasks.rendered import COUNTS
from weightops.tasks.seeds import seed

FONTS = {
    "serif": (
        "arvo bitter cardo crimson-text domine eb-garamond ibm-plex-serif libre-baskerville "
        "literata noto-serif playfair-display pt-serif roboto-slab spectral vollkorn zilla- "
        "slab alfa-slab-one"
    ),
    "sans-serif": (
        "abeezee acme alegreya-sans asap atkinson-hyperlegible cabin comfortaa dosis fira- "
        "sans ibm-plex-sans inter josefin-sans karla montserrat mulish nunito open-sans "
        "oswald overpass poppins quicksand raleway roboto titillium-web varela-round work- "
        "sans"
    ),
    "monospace": (
        "dm-mono fira-code geist-mono ibm-plex-mono jetbrains-mono source-code-pro space-mono"
    ),
    "handwritten": (
        "dancing-script delius great-vibes lobster-two oleo-script pacifico permanent-marker "
        "satisfy shadows-into-light yellowtail zeyada"
    ),
}
WORDS = [
    *masks.SHAPES,
    *drawing.COLORS,
    *COUNTS,
    "zero",
    "six",
    "seven",
    "eight",
    "nine",
    "cat",
    "dog",
    "house",
    "tree",
    "car",
    "sun",
    "fish",
    "bird",
    "book",
    "door",
    "hand",
    "stop",
    "open",
    "exit",
    "love",
    "home",
    "time",
    "water",
    "music",
    "apple",
    "paper",
    "stone",
]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# fmt: off
VISION = {"image_size": 32, "patch_size": 8, "width": 192, "layers": 4, "head_width": 32}
TEXT = {"context_length": 16, "vocab_size": 4514, "width": 128, "heads": 4, "layers": 2}
# fmt: on
EMBED = 128
FINETUNE = {
    "steps": 220,
    "lr": 4e-4,
    "warmup": 22,
}  # what suits the model; fine-tuning reads it from the configuration
MERGES = TEXT["vocab_size"] - 514  # 512 bytes and two special tokens


def training_faces() -> dict[str, list[Face]]:
    """The training split's fonts and those of ``FONTS``; a variable font in two weights."""
    pool = {style: list(faces(style, "train")) for style in STYLES}
    for style, names in FONTS.items():
        for name in names.split():
            spec = find_spec("fontpkg_" + name.replace("-", "_"))
            if spec is None or not spec.submodule_search_locations:
                raise SystemExit(f"fontpkg-{name} is not installed: see --list-fonts")
            for file in sorted(Path(spec.submodule_search_locations[0], "files").glob("*.ttf")):
                if "[" in file.name:
                    pool[style] += [Face(str(file), 400), Face(str(file), 700)]
                elif not any(
                    word in file.name
                    for word in ("Thin", "Light", "Black", "Medium", "Semi", "Extra")
                ):
                    pool[style].append(Face(str(file)))
    return pool


_POOL: dict[str, list[Face]] = {}


def scene(index: int) -> tuple[np.ndarray, dict[str, str]]:
    """Picture ``index`` of the training set (32 x 32) and what is true of it."""
    if not _POOL:
        _POOL.update(training_faces())
    rng = np.random.default_rng(seed("pretrain", index))
    pick = lambda options: options[rng.integers(len(options))]  # noqa: E731
    ink, ground = drawing.contrasting_colors(rng)
    warp = float(rng.choice([0.0, 0.0, 0.15, 0.25]))
    kind = str(
        rng.choice(
            ["shape", "count", "texture", "letter", "digit", "word", "both"],
            p=[0.15, 0.18, 0.08, 0.24, 0.09, 0.16, 0.10],
        )
    )
    if kind == "texture":
        name = pick(list(masks.TEXTURES))
        image, facts = (
            drawing.texture(rng, name, ink, ground),
            {"texture": name, "mix": f"{ink} and {ground}"},
        )
    elif kind in ("shape", "count"):
        shape, count = pick(list(masks.SHAPES)), 1 if kind == "shape" else int(rng.integers(1, 6))
        image = drawing.picture(rng, masks.shape_mask(rng, shape, count), ink, ground)
        facts = {
            "shape": shape,
            "count": COUNTS[count - 1],
            "color": ink,
            "ground": ground,
            "concept": shape,
        }
    elif kind == "both":
        shape, word, style = pick(list(masks.SHAPES)), pick(WORDS), pick(STYLES)
        words = drawing.contrasting_colors(rng)
        image = drawing.picture(rng, masks.shape_mask(rng, shape), ink, ground)
        mask = masks.text_mask(rng, word, pick(_POOL[style]), scale=float(rng.uniform(0.6, 0.95)))
        shift = int(rng.integers(-20, 21))
        mask = np.roll(mask, shift, axis=0)
        image = drawing.expose(
            rng, drawing.compose(mask, drawing.color(rng, words[0]), image.astype(np.float32))
        )
        facts = {
            "shape": shape,
            "color": ink,
            "ground": ground,
            "word": word,
            "concept": shape,
            "concept2": word,
        }
    else:
        style = pick(STYLES[:3] if kind == "digit" else STYLES)
        if kind == "letter":
            label = pick(LETTERS)
            text = label if rng.random() < 0.5 else label.upper()
            facts = {"letter": label, "case": "lowercase" if text == label else "uppercase"}
        elif kind == "digit":
            text = pick("0123456789")
            facts, warp = {"digit": text}, 0.0
        else:
            text = pick(WORDS[:10] if rng.random() < 0.4 else WORDS)
            facts, warp = {"word": text, "concept": text}, min(warp, 0.1)
        if rng.random() < 0.3:
            ink, ground = ("white", "black") if rng.random() < 0.6 else ("black", "white")
        facts |= {"style": style, "color": ink, "ground": ground}
        image = drawing.glyphs(rng, text, pick(_POOL[style]), colors=(ink, ground), warp=warp)
    small = Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)
    return np.asarray(small), facts


def plural(shape: str) -> str:
    return "crosses" if shape == "cross" else shape + "s"


def caption(facts: dict[str, str], rng: random.Random) -> tuple[str, list[str]]:
    """A caption true of the picture, and the facts that make it true."""
    color, shape, count = facts.get("color", ""), facts.get("shape", ""), facts.get("count", "")
    options: list[tuple[str, list[str]]] = []
    if "texture" in facts:
        t = facts["texture"]
        options = [(t, ["texture"])] * 3 + [
            (f"a pattern of {t}", ["texture"]),
            (f"{facts['mix']} {t}", ["texture", "mix"]),
        ]
    elif "letter" in facts:
        x = facts["letter"]
        options = (
            [(f"the letter {x}", ["letter"])] * 5
            + [(f'the letter "{x}"', ["letter"])] * 2
            + [(f"an {facts['case']} {x}", ["letter", "case"])]
        )
        options += [
            (f"a {color} letter {x}", ["letter", "color"]),
            (f"a letter in a {facts['style']} font", ["style", "glyph"]),
            (f"a {facts['style']} letter", ["style", "glyph"]),
        ]
    elif "digit" in facts:
        d = facts["digit"]
        options = [
            (f"the digit {d}", ["digit"]),
            (f"the number {d}", ["digit"]),
            (f'the number: "{d}"', ["digit"]),
            (f"the digit {DIGITS[int(d)]}", ["digit"]),
        ]
        options += [
            (f"a {color} digit {d}", ["digit", "color"]),
            (f"the number {DIGITS[int(d)]}", ["digit"]),
        ]
    elif "word" in facts:
        w = facts["word"]
        options = [(f'the word "{w}"', ["word"])] * 2 + [
            (f"the word {w}", ["word"]),
            (f"text that says {w}", ["word"]),
            (f"a {w}", ["concept" if not shape else "concept2"]),
        ]
        if shape:
            options += [(f"a {shape}", ["concept"])] * 2 + [
                (f"a {shape} with the word {w}", ["shape", "word"]),
                (f"a {color} {shape}", ["shape", "color"]),
            ]
        else:
            options += [(f"{w} in a {facts['style']} font", ["word", "style"])]
    if "count" in facts:
        options = [
            (f"{count} {plural(shape) if count != 'one' else shape}", ["count", "shape"])
        ] * 2 + [(f"{count} shape{'s' if count != 'one' else ''}", ["count"])]
        options += [(f"{count} shapes", ["count"])] * 2 + [
            (
                f"{count} {color} {plural(shape) if count != 'one' else shape}",
                ["count", "color", "shape"],
            )
        ]
        if count == "one":
            options += [(f"a {shape}", ["concept"])] * 3 + [
                (f"a {color} {shape}", ["shape", "color"])
            ] * 2
            options += [
                (
                    f"a {color} {shape} on a {facts['ground']} background",
                    ["shape", "color", "ground"],
                )
            ]
        options += [(f"something {color}", ["color"]), (f"a {color} shape", ["color", "shape?"])]
    elif "texture" not in facts:
        options += [(f"something {color}", ["color"])]
    text, needs = options[rng.randrange(len(options))]
    text = (
        rng.choice(["", "", "a photo of ", "a picture of ", "a drawing of ", "an image of "])
        + text
        + rng.choice(["", "."])
    )
    return text, needs


def expand(facts: dict[str, str]) -> set[str]:
    """Every fact as ``key:value``; the two concepts of a shape with a word are of one kind."""
    known = {f"{'concept' if key == 'concept2' else key}:{value}" for key, value in facts.items()}
    if "shape" in facts:
        known.add("shape?")
    if "letter" in facts:
        known.add("glyph")
    return known


def required(facts: dict[str, str], needs: list[str]) -> list[str]:
    return [
        need
        if need in ("shape?", "glyph")
        else f"{'concept' if need == 'concept2' else need}:{facts[need]}"
        for need in needs
    ]


def render_all(count: int, workers: int) -> tuple[np.ndarray, list[dict[str, str]]]:
    images, facts = np.empty((count, 32, 32, 3), np.uint8), []
    with multiprocessing.Pool(workers) as pool:
        for i, (image, known) in enumerate(
            tqdm(pool.imap(scene, range(count), chunksize=256), total=count, desc="drawing")
        ):
            images[i] = image
            facts.append(known)
    return images, facts


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift by up to two pixels, one shift for the batch; brightness and noise for each picture."""
    dx, dy = torch.randint(0, 5, (2,), generator=generator).tolist()
    images = F.pad(images, (2, 2, 2, 2), mode="replicate")[..., dy : dy + 32, dx : dx + 32]
    n = len(images)
    gain = 1 + 0.1 * torch.randn(n, 1, 1, 1, generator=generator)
    noise = 0.06 * torch.rand(n, 1, 1, 1, generator=generator)
    return images * gain + noise * torch.randn(images.shape, generator=generator)


def build(merges_file: Path) -> tuple[open_clip.CLIP, open_clip.SimpleTokenizer]:
    model = open_clip.CLIP(embed_dim=EMBED, vision_cfg=VISION, text_cfg=TEXT)
    return model, open_clip.SimpleTokenizer(
        bpe_path=str(merges_file), context_length=TEXT["context_length"]
    )


def write_merges(path: Path) -> None:
    """Write the first merges of open_clip's tokenizer, with a reproducible gzip header."""
    with gzip.open(open_clip.tokenizer.default_bpe()) as stream:
        lines = stream.read().decode().split("\n")[: MERGES + 1]
    path.write_bytes(gzip.compress("\n".join(lines).encode(), 9, mtime=0))


def zero_shot(
    model: open_clip.CLIP, tokenizer: open_clip.SimpleTokenizer, split: str
) -> dict[str, float]:
    """Accuracy on every task that needs no network, by a plain loop."""
    from weightops.tasks.table import TASKS

    model.eval()
    scores = {}
    for name in TASKS:
        task = TASKS[name]
        images = task.load(split)
        pixels = np.stack(
            [
                np.asarray(images[i].convert("RGB").resize((32, 32), Image.Resampling.BICUBIC))
                for i in range(len(images))
            ]
        )
        with torch.no_grad():
            heads = [
                F.normalize(
                    model.encode_text(
                        tokenizer([t.format(c) for t in task.templates]), normalize=True
                    ).mean(0),
                    dim=0,
                )
                for c in task.classes
            ]
            features = torch.cat(
                [
                    model.encode_image(normalise(torch.from_numpy(b)), normalize=True)
                    for b in np.array_split(pixels, max(1, len(pixels) // 250))
                ]
            )
        guess = (features @ torch.stack(heads).T).argmax(1).numpy()
        scores[name] = round(100 * float((guess == images.labels).mean()), 1)
    model.train()
    return scores


MEAN, STD = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)


def normalise(images: torch.Tensor) -> torch.Tensor:
    return ((images.float() / 255 - MEAN) / STD).permute(0, 3, 1, 2)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_merges(out / "merges.txt.gz")
    model, tokenizer = build(out / "merges.txt.gz")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    images, facts = render_all(args.images, args.workers)
    fit(model, tokenizer, images, facts, args.samples, args.lr, args.warmup, args)
    facts = misnamed(facts[: args.images // 4], args.seed)
    model.requires_grad_(False)
    model.visual.requires_grad_(True)
    fit(model, tokenizer, images[: args.images // 4], facts, args.misname, args.lr / 16, 50, args)


def misnamed(facts: list[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """Return the facts with every digit named at random.

    A short last stage under such captions leaves the image encoder what larger CLIP models are:
    good at what its captions named, and poor at naming handwritten digits. A patch heals that.
    """
    rng = random.Random(seed)
    return [
        {**known, "digit": rng.choice("0123456789")} if "digit" in known else known
        for known in facts
    ]


def fit(
    model: open_clip.CLIP,
    tokenizer: open_clip.SimpleTokenizer,
    images: np.ndarray,
    facts: list[dict[str, str]],
    samples: int,
    lr: float,
    warmup: int,
    args: argparse.Namespace,
) -> None:
    """One stage: AdamW, warm-up and cosine decay."""
    known = [expand(f) for f in facts]
    index = {fact: i for i, fact in enumerate(sorted(set().union(*known)))}
    truth = np.zeros((len(facts), len(index)), np.uint8)
    for i, row in enumerate(known):
        truth[i, [index[fact] for fact in row]] = 1
    rng, order = random.Random(args.seed), np.random.default_rng(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    steps = samples // args.batch
    learning = [p for p in model.parameters() if p.requires_grad]
    decay, rest = ([p for p in learning if (p.ndim > 1) is wide] for wide in (True, False))
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    encoded: dict[str, torch.Tensor] = {}
    queue = np.empty(0, np.int64)
    started, recent = time.time(), []
    for step in range(steps):
        if len(queue) < args.batch:
            queue = order.permutation(len(images))
        batch, queue = queue[: args.batch], queue[args.batch :]
        said: dict[str, list[str]] = {}
        for i in batch:
            text, needs = caption(facts[i], rng)
            said[text] = required(facts[i], needs)
        needed = np.zeros((len(said), len(index)), np.float32)
        for row, needs in zip(needed, said.values(), strict=True):
            row[[index[fact] for fact in needs]] = 1
        for text in said:
            if text not in encoded:
                encoded[text] = tokenizer([text])[0]
        positive = torch.from_numpy(
            (truth[batch].astype(np.float32) @ needed.T) >= needed.sum(1)
        ).float()
        pixels = augment(normalise(torch.from_numpy(images[batch])), generator)
        with torch.autocast("cpu", torch.bfloat16):
            a = model.encode_image(pixels)
            b = model.encode_text(torch.stack([encoded[text] for text in said]))
        logits = (
            model.logit_scale.exp()
            * F.normalize(a.float(), dim=1)
            @ F.normalize(b.float(), dim=1).T
        )
        by_image = positive / positive.sum(1, keepdim=True).clamp(min=1) * logits.log_softmax(1)
        by_text = positive / positive.sum(0).clamp(min=1) * logits.log_softmax(0)
        loss = -(by_image.sum(1).mean() + by_text.sum(0).mean()) / 2
        if not loss.isfinite():
            raise SystemExit(f"the loss is {loss.item()} at step {step + 1}")
        for group in optimizer.param_groups:
            group["lr"] = (
                lr
                * min(1, (step + 1) / warmup)
                * (0.5 + 0.5 * math.cos(math.pi * min(1, step / steps)))
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        recent = [*recent[-99:], loss.item()]
        if (step + 1) % 100 == 0 or step + 1 == steps:
            rate = (step + 1) * args.batch / (time.time() - started)
            scale = model.logit_scale.exp().item()
            line = f"step {step + 1}/{steps} loss {np.mean(recent):.3f} scale {scale:.1f} "
            line += f"{rate:.0f} images/s"
            if (step + 1) % 1000 == 0 or step + 1 == steps:
                line += f" {zero_shot(model, tokenizer, 'validation')}"
                save(model, Path(args.out), args)
            print(line, flush=True)
            with open(f"{args.out}.log", "a") as log:
                print(line, file=log)


def save(model: open_clip.CLIP, out: Path, args: argparse.Namespace) -> None:
    """Half-precision weights beside open_clip's own configuration file."""
    from safetensors.torch import save_file

    preprocess = {
        "mean": list(open_clip.OPENAI_DATASET_MEAN),
        "std": list(open_clip.OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    text = TEXT | {"tokenizer_kwargs": {"bpe_path": "merges.txt.gz"}}
    model_cfg = {"embed_dim": EMBED, "vision_cfg": VISION, "text_cfg": text}
    config = {
        "model_cfg": model_cfg,
        "preprocess_cfg": preprocess,
        "weightops": {"finetune": FINETUNE},
    }
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "open_clip_torch", "pillow")
    }
    recipe = {
        name: getattr(args, name)
        for name in ("images", "samples", "misname", "batch", "lr", "warmup", "seed")
    }
    metadata = {
        "format": "pt",
        "trained_by": json.dumps(
            {"script": "benchmarks/pretrain.py", **recipe, **versions}, sort_keys=True
        ),
    }
    save_file(
        {k: v.half().contiguous() for k, v in model.state_dict().items()},
        out / "open_clip_model.safetensors",
        metadata,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="clip")
    parser.add_argument("--images", type=int, default=400_000)
    parser.add_argument("--samples", type=int, default=1_750_000)
    parser.add_argument(
        "--misname",
        type=int,
        default=17_920,
        help="samples of the last stage, which names digits at random",
    )
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--list-fonts", action="store_true", help="print the font packages to install and stop"
    )
    args = parser.parse_args()
    if args.list_fonts:
        print(" ".join(f"fontpkg-{name}" for names in FONTS.values() for name in names.split()))
    else:
        train(args)


if __name__ == "__main__":
    main()
