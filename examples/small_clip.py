"""Makes a small CLIP from Fashion-MNIST, and the data to adapt it with by `python -m evaluate base-to-novel`.

    python examples/small_clip.py FASHION_MNIST OUT

OUT/clip is a transformers checkpoint of 0.3 million parameters that has read the captions of 50,000 training images
once. OUT/fashion-mnist holds the other 10,000, the test images and the names of the classes. No package holds a
published CLIP, and this one needs no download. FASHION_MNIST is the folder of the four files *-ubyte.gz.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import tokenizers
import torch
import transformers

NAMES = [
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]
PRETRAINED = 50_000
BATCH = 128
WIDTH = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "projection_dim": 64}


def make_model(folder: Path) -> tuple[transformers.CLIPModel, torch.Tensor]:
    """The model, and the captions' tokens."""
    words = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        *" ".join(["a photo of a .", *NAMES]).replace("-", " - ").split(),
    ]
    vocabulary = {word: place for place, word in enumerate(dict.fromkeys(words))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    text = WIDTH | {
        "vocab_size": len(vocabulary), "num_hidden_layers": 2, "max_position_embeddings": 16,
        "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    vision = WIDTH | {"image_size": 28, "patch_size": 7, "num_hidden_layers": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
    captions = fast([f"a photo of a {name}." for name in NAMES], padding=True, return_tensors="pt")
    return transformers.CLIPModel(config), captions


def read(path: Path, header: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(gzip.open(path).read()[header:]), dtype=torch.uint8)


def main(data: Path, out: Path, pretrained: int = PRETRAINED) -> None:
    torch.manual_seed(0)
    images = read(data / "train-images-idx3-ubyte.gz", 16).view(-1, 28, 28)
    labels = read(data / "train-labels-idx1-ubyte.gz", 8)
    model, captions = make_model(out / "clip")
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    order = torch.randperm(pretrained)
    for place in range(0, pretrained, BATCH):
        rows = order[place : place + BATCH]
        pixels = (images[rows].float()[:, None].expand(-1, 3, -1, -1) / 255 - mean) / deviation
        logits = model(pixel_values=pixels, **captions).logits_per_image
        loss = torch.nn.functional.cross_entropy(logits, labels[rows].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.2f}")
    model.save_pretrained(out / "clip")
    kept = out / data.name
    kept.mkdir(exist_ok=True)
    (kept / "classes.txt").write_text("\n".join(NAMES).replace(" ", "_") + "\n")
    rest = len(images) - pretrained
    for name, values, shape in (
        ("train-images-idx3-ubyte.gz", images[pretrained:], (2051, rest, 28, 28)),
        ("train-labels-idx1-ubyte.gz", labels[pretrained:], (2049, rest)),
    ):
        header = b"".join(number.to_bytes(4, "big") for number in shape)
        (kept / name).write_bytes(gzip.compress(header + values.numpy().tobytes()))
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        (kept / name).write_bytes((data / name).read_bytes())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("python examples/small_clip.py FASHION_MNIST OUT")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
