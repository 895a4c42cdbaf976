"""Writes small tokenizers, and expected.json.gz: what transformers makes of texts.

    python tests/text/goldens/make_tokenizers.py

Needs the `parity` extra (transformers), which most of the tests do not. Everything is
made up: in made_up.json the text to train on, chat templates in the manner of known
ones and conversations; here folders as models have them (byte-level BPE as Llama 3's,
byte fallback as Mistral's and as Gemma's), and 1,000 texts from a seeded generator.

expected.json.gz holds "texts"; of each tokenizer its class, "ids", and "decoded" where
that is not the text itself; "chats", where a template that fails leaves its "error";
and "variants", folders with other files, and the ids of the first "edges" texts there.
"""

import collections
import gzip
import json
import pathlib
import random
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import tokenizers
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

FOLDER = pathlib.Path(__file__).parent
PATH = FOLDER / "expected.json.gz"
COUNT = 1000  # texts
ALPHABET = 160  # characters that are tokens; the others are bytes

MADE_UP = json.loads((FOLDER / "made_up.json").read_bytes())
TEXTS, CONVERSATIONS = MADE_UP["texts"], MADE_UP["conversations"]
TEMPLATES = {name: "\n".join(lines) for name, lines in MADE_UP["templates"].items()}
OTHERS = ("chatml", "features")  # templates for all of the tokenizers
PIECES = (
    *(TEXTS[name] for name in ("words", "words", "lines", "scripts", "emoji", "marks")),
    *(TEXTS[name] for name in ("numbers", "special", "control", "long")),
)


def corpus() -> list[str]:
    """Text to train on."""
    source = random.Random(1)
    lines = [" ".join(source.choices(TEXTS["words"], k=12)) + ".\n" for _ in range(300)]
    numbers = " ".join(TEXTS["numbers"])
    others = [*TEXTS["lines"], *TEXTS["scripts"], numbers, "\n\n", "    ", "  "]
    return lines + others * 6 + TEXTS["emoji"] * 2


def texts() -> list[str]:
    """The edge cases, and pieces of all kinds with all kinds of space between."""
    source = random.Random(2)
    names = ("edges", "spaces", "special", "long", "emoji", "scripts", "lines")
    found = dict.fromkeys(text for name in names for text in TEXTS[name])
    spaces = TEXTS["spaces"]
    while len(found) < COUNT:
        parts = []
        for _ in range(source.choice((1, 2, 2, 3, 4, 6))):
            space = source.choice((" ", " ", "", source.choice(spaces)))
            parts += [space, source.choice(source.choice(PIECES))]
        parts = parts[source.choice((0, 1, 1)) :]
        found["".join(parts) + source.choice(("", "", *spaces[:2], "\n"))] = None
    return list(found)


# Tokenizers

# As Llama 3's.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eot_id|>"),
)


def byte_level() -> tokenizers.Tokenizer:
    """A BPE of bytes, as Llama 3's; with tokens as Qwen adds that are not special."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(list(LLAMA3_SPECIAL))
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False) for text in ("<think>", "</think>")]
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), adds(tokenizer, LLAMA3_SPECIAL[0])]
    )
    return tokenizer


def adds(tokenizer: tokenizers.Tokenizer, bos: str) -> processors.TemplateProcessing:
    """What puts BOS before a text."""
    return processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )


def byte_fallback(control: tuple[str, ...], size: int) -> tokenizers.Tokenizer:
    """A BPE of characters whose first tokens are these, and then the 256 bytes."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    first = [*control, *(f"<0x{byte:02X}>" for byte in range(256))]
    text = "".join(corpus()).replace(" ", "▁")
    counts = collections.Counter(c for c in text if c.isprintable()).items()
    common = sorted(counts, key=lambda item: (-item[1], item[0]))[:ALPHABET]
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(first),
        initial_alphabet=[character for character, _ in common],
        limit_alphabet=ALPHABET,
        show_progress=False,
    )
    trained.train_from_iterator(corpus(), trainer)
    model = json.loads(trained.to_str())["model"]
    rest = sorted(model["vocab"], key=model["vocab"].__getitem__)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={text: index for index, text in enumerate([*first, *rest])},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in control]
    )
    return tokenizer


def mistral() -> tokenizers.Tokenizer:
    """Byte fallback, and a space before the text, as Llama 2's and Mistral's."""
    control = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
    tokenizer = byte_fallback(control, 800)
    tokenizer.add_tokens([AddedToken("<|tool|>", rstrip=True, normalized=False)])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = adds(tokenizer, "<s>")
    return tokenizer


def llama() -> tokenizers.Tokenizer:
    """As `mistral`, in the newer way: a space before the beginning of a text alone."""
    tokenizer = mistral()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    return tokenizer


def gemma() -> tokenizers.Tokenizer:
    """Byte fallback, no space before the text, and runs that are tokens, as Gemma's."""
    control = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    tokenizer = byte_fallback((*control, "<start_of_turn>", "<end_of_turn>"), 800)
    runs = ("\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "\t", "<div>")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in runs])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = adds(tokenizer, "<bos>")
    return tokenizer


# Folders

CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
LLAMA = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": None,
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "sp_model_kwargs": {},
    "spaces_between_special_tokens": False,
    "tokenizer_class": "LlamaTokenizerFast",
    "use_default_system_prompt": False,
}
FOLDERS: dict[str, tuple[Callable[[], tokenizers.Tokenizer], dict, dict]] = {
    # Its maker, tokenizer_config.json, and other files.
    "byte_level": (
        byte_level,
        {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "chat_template": TEMPLATES["llama3"],
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 131072,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        {},
    ),
    # With this model type, transformers takes tokenizer.json as it stands.
    "mistral": (
        mistral,
        LLAMA | {"legacy": True},
        {
            "config.json": {"model_type": "mistral"},
            "chat_template.jinja": TEMPLATES["mistral"],
        },
    ),
    "llama": (
        llama,
        LLAMA | {"legacy": False, "chat_template": TEMPLATES["zephyr"]},
        {},
    ),
    "gemma": (
        gemma,
        {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "GemmaTokenizer",
        },
        {"chat_template.jinja": TEMPLATES["gemma"]},
    ),
}
EOT = {"content": "<|eot_id|>", "lstrip": False, "normalized": False, "rstrip": False}
PADDING = {
    "strategy": {"Fixed": 64},
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 2,
    "pad_type_id": 0,
    "pad_token": "</s>",
}
TRUNCATION = {
    "direction": "Right",
    "max_length": 8,
    "strategy": "LongestFirst",
    "stride": 0,
}
# The folder, and changes: [file] is removed, as is [file, key]; [file, key, value] set.
VARIANTS: dict[str, tuple[str, list[list]]] = {
    "no class": ("byte_level", [[CONFIG, "tokenizer_class"]]),
    "no added_tokens_decoder": ("byte_level", [[CONFIG, "added_tokens_decoder"]]),
    "no special_tokens_map": ("gemma", [[MAP]]),
    "special_tokens_map alone": ("byte_level", [[CONFIG]]),
    "tokenizer.json alone": ("byte_level", [[CONFIG], [MAP]]),
    "special tokens as objects": (
        "byte_level",
        [
            [CONFIG, "eos_token", EOT | {"__type": "AddedToken"}],
            [MAP, "eos_token", EOT],
        ],
    ),
    "the map says otherwise": ("byte_level", [[MAP, "eos_token", "<|end_of_text|>"]]),
    "the map says otherwise, no added_tokens_decoder": (
        "byte_level",
        [
            [CONFIG, "added_tokens_decoder"],
            [MAP, "eos_token", "<|end_of_text|>"],
        ],
    ),
    "add_bos_token true": ("byte_level", [[CONFIG, "add_bos_token", True]]),
    "add_bos_token false": ("byte_level", [[CONFIG, "add_bos_token", False]]),
    "add_bos_token true, no post_processor": (
        "mistral",
        [["tokenizer.json", "post_processor", None]],
    ),
    "add_eos_token true": ("mistral", [[CONFIG, "add_eos_token", True]]),
    "padding and truncation": (
        "mistral",
        [
            ["tokenizer.json", "padding", PADDING],
            ["tokenizer.json", "truncation", TRUNCATION],
        ],
    ),
    "eos is an added token, not a special one": (
        "byte_level",
        [[CONFIG, "eos_token", "<think>"], [MAP, "eos_token", "<think>"]],
    ),
    "eos is an added token that takes the space after it": (
        "mistral",
        [[CONFIG, "eos_token", "<|tool|>"]],
    ),
    "another name for an added token": (
        "byte_level",
        [[CONFIG, "think_token", "<think>"]],
    ),
    "eos is in the vocabulary alone": (
        "mistral",
        [[CONFIG, "eos_token", "▁of"], [MAP, "eos_token", "▁of"]],
    ),
}


def write(folder: pathlib.Path, name: str) -> None:
    """A tokenizer's folder, as a model's."""
    make, config, others = FOLDERS[name]
    folder.mkdir(exist_ok=True)
    tokenizer = make()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    added = json.loads(tokenizer.to_str())["added_tokens"]
    config = {"added_tokens_decoder": {item.pop("id"): item for item in added}} | config
    special = {
        key: text
        for key, text in config.items()
        if key.endswith("_token") and isinstance(text, str)
    }
    for file, content in ({CONFIG: config, MAP: special} | others).items():
        put(folder / file, content)


def put(file: pathlib.Path, content: Any) -> None:
    """A template as it is, the rest as JSON; None for no file."""
    if content is None:
        file.unlink()
        return
    if not isinstance(content, str):
        content = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    file.write_text(content, encoding="utf-8", newline="\n")


def changed(name: str) -> dict[str, Any]:
    """The contents of the files that a variant changes; None = there is none."""
    source, changes = VARIANTS[name]
    files: dict[str, Any] = {}
    for file, *change in changes:
        if not change:
            files[file] = None
            continue
        if file not in files:
            files[file] = json.loads((FOLDER / source / file).read_bytes())
        key, *values = change
        files[file].pop(key, None)
        if values:
            files[file][key] = values[0]
    return files


# What transformers makes of them


def tokens(tokenizer: Any, given: list[str]) -> dict[str, Any]:
    """The ids of texts, and their texts where these are others."""
    ids = [tokenizer.encode(text) for text in given]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    decoded = [tokenizer.decode(row, **options) for row in ids]
    pairs = enumerate(zip(given, decoded, strict=True))
    return {
        "class": type(tokenizer).__name__,
        "ids": ids,
        "decoded": {index: new for index, (old, new) in pairs if old != new},
    }


def rendered(tokenizer: Any, messages: list[dict], **options: Any) -> Any:
    """A conversation's text or ids, or the error's message."""
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:
        return {"error": str(error)}


def chats(tokenizer: Any, template: str | None) -> dict[str, dict[str, Any]]:
    """All conversations: the text, with the next turn begun and not, and the ids."""
    options = {"chat_template": template, "add_generation_prompt": True}
    found = {}
    for name, messages in CONVERSATIONS.items():
        plain = {"chat_template": template, "tokenize": False}
        found[name] = {
            "plain": rendered(tokenizer, messages, **plain),
            "text": rendered(tokenizer, messages, tokenize=False, **options),
            "ids": rendered(tokenizer, messages, return_dict=False, **options),
        }
    return found


def variant(name: str) -> dict[str, Any]:
    """What becomes of the edge cases in a folder that was changed."""
    source, files = VARIANTS[name][0], changed(name)
    with tempfile.TemporaryDirectory() as parent:
        folder = shutil.copytree(FOLDER / source, pathlib.Path(parent) / source)
        for file, content in files.items():
            put(folder / file, content)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return {
            "tokenizer": source,
            "files": files,
            "eos": tokenizer.eos_token_id,
            "special": tokenizer.special_tokens_map,
            **tokens(tokenizer, TEXTS["edges"]),
        }


def main() -> None:
    """Writes the folders and the file; prints what they hold."""
    goldens: dict[str, Any] = {
        "versions": {
            "tokenizers": tokenizers.__version__,
            "transformers": transformers.__version__,
        },
        "edges": len(TEXTS["edges"]),
        "texts": texts(),
        "templates": {name: TEMPLATES[name] for name in OTHERS},
        "conversations": CONVERSATIONS,
        "tokenizers": {},
        "chats": {},
    }
    for name in FOLDERS:
        write(FOLDER / name, name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER / name)
        goldens["tokenizers"][name] = tokens(tokenizer, goldens["texts"])
        own = {"own": chats(tokenizer, None)}
        others = {key: chats(tokenizer, TEMPLATES[key]) for key in OTHERS}
        goldens["chats"][name] = own | others
        print(name, type(tokenizer).__name__, len(tokenizer))
    goldens["variants"] = {name: variant(name) for name in VARIANTS}
    text = json.dumps(goldens, separators=(",", ":"), ensure_ascii=False)
    PATH.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(len(goldens["texts"]), "texts,", PATH.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
