"""Model references to models: a folder, an artifact, a URI, a hub id, or the starter; with or without an adapter."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from raytune_ft.core.artifacts import Artifact, has_manifest, open_artifact
from raytune_ft.core.errors import ModelError, first_line
from raytune_ft.core.manifest import ArtifactKind, Parent
from raytune_ft.core.storage import Location, cache_folder, source_digest
from raytune_ft.models import starter
from raytune_ft.models.chat import Chat
from raytune_ft.models.config import Precision

logger = logging.getLogger("raytune_ft")

COMPACT = "weights.compact.safetensors"
"""File that holds the weights of a pruned model's compact folder (`models.sparsity`)."""
UNREADABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
"""What transformers raises where a model's files are missing, damaged, or of a kind that it does not know."""
_TOLD_GB = 2.0
"""From which size on the check of an artifact's files is announced, since it takes seconds."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ModelReference:
    """Where a model's parts lie: what `from_pretrained` takes, an adapter folder upon it, and our artifact, if any."""

    given: str
    base: str
    adapter: Path | None
    artifact: Artifact | None
    digest: str

    @property
    def tokenizer_source(self) -> str:
        """The folder (or hub id) whose tokenizer and chat template count: the adapter's, if it brings them."""
        if self.adapter is not None and (self.adapter / "tokenizer_config.json").exists():
            return str(self.adapter)
        return self.base


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with its tokenizer and chat template, on its device."""

    model: Any
    tokenizer: Any
    chat: Chat
    reference: ModelReference
    device: str

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: those of the chat, and those that the model itself names."""
        return tuple(sorted({*self.chat.stop_ids, *own_stop_ids(self.model)}))


def own_stop_ids(model: Any) -> tuple[int, ...]:
    """Tokens that end an answer by a model's generation settings, which may name several (end of turn, of a call)."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = getattr(getattr(causal, "generation_config", None), "eos_token_id", None)
    return tuple(found) if isinstance(found, list | tuple) else (() if found is None else (int(found),))


def shared_model(reference: str, storage: Location) -> str:
    """What every node of the cluster can load: the starter is put under `storage`, anything else stays as it is.

    A relative local path becomes absolute, since workers have another working folder.
    """
    if reference.startswith(starter.SCHEME):
        return starter.place(reference, storage)
    if "://" not in reference and Path(reference).expanduser().exists():
        return str(Path(reference).expanduser().absolute())
    return reference


def resolve_model(reference: str) -> ModelReference:
    """Where the parts of a model lie; artifacts on object stores are copied into this machine's cache.

    Raises:
        ModelError: if `reference` leads to nothing, or to a folder that holds no model.
        ArtifactError: if it leads to an artifact that is unfinished, damaged, or no model.
    """
    if reference.startswith(starter.SCHEME):
        return resolve_model(str(starter.cached(reference)))
    location = Location.at(reference)
    if not location.exists():
        if "://" not in reference and _HUB_ID.fullmatch(reference):
            return ModelReference(reference, reference, None, None, _text_digest(reference))
        raise ModelError(f"{location}: there is no such model folder (nor is this a hub id like org/name)")
    artifact = None
    if has_manifest(location) or (location / "started.json").exists():
        artifact = open_artifact(location, ArtifactKind.MODEL, verify="size")
        folder, digest = artifact.local(), artifact.digest
    else:
        folder, digest = _local_folder(location)
    if (folder / "adapter_config.json").exists():
        base = resolve_model(_adapter_base(folder))
        return ModelReference(reference, base.base, folder, artifact, digest)
    if is_compact(folder):
        return ModelReference(reference, str(_expanded(folder, digest)), None, artifact, digest)
    if not (folder / "config.json").exists():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise ModelError(f"{location}: is not a model: neither config.json nor adapter_config.json is in it ({found})")
    return ModelReference(reference, str(folder), None, artifact, digest)


def resolve_adapter(reference: str, setting: str = "") -> ModelReference:
    """As `resolve_model`, of an adapter, which lies in a folder or on an object store; `setting` begins what is said.

    Raises:
        ModelError: as there, or if it is a whole model, or only a name that a hub may know.
    """
    resolved = resolve_model(reference)
    if resolved.adapter is not None:
        return resolved
    named = f"{setting}: {reference}" if setting else reference
    if not reference.startswith(starter.SCHEME) and not Location.at(reference).exists():
        raise ModelError(f"{named}: there is no such adapter folder; one that a hub has is to be downloaded first")
    raise ModelError(f"{named} is a whole model, not an adapter" + ("; give it as model_path" if setting else ""))


def is_compact(folder: Path) -> bool:
    """Whether a folder holds its weights in the compact form."""
    return (folder / COMPACT).exists()


def _expanded(folder: Path, digest: str) -> Path:
    """The ordinary folder of a compact pruned model, made once in this machine's cache."""
    target = cache_folder() / "models" / f"{digest}-expanded"
    if not (target / ".complete").exists():
        from raytune_ft.models.sparsity import expand

        expand(folder, target)
        (target / ".complete").touch()
    return target


def gives_scores(resolved: ModelReference) -> bool:
    """Whether a model, or the adapter upon it, gives scores and no text, by what its files say."""
    if resolved.adapter is not None:
        return bool(_json(resolved.adapter / "adapter_config.json").get("task_type") == "SEQ_CLS")
    names = _json(Path(resolved.base) / "config.json").get("architectures") or []
    return any(str(name).endswith("ForSequenceClassification") for name in names)


def refuse_scorer(resolved: ModelReference) -> None:
    """Checks that a model writes text: loaded as if it did, one that gives scores would have a head of random values.

    Raises:
        ModelError: if it gives scores.
    """
    if gives_scores(resolved):
        raise ModelError(
            f"{resolved.given}: is a reward model (or another classifier), which gives scores and writes no text; give "
            "the model that it judges"
        )


def refuse_writer(resolved: ModelReference) -> None:
    """Checks that a model gives scores, as one that judges answers (``reward_model_path``) has to.

    Raises:
        ModelError: if it writes text.
    """
    if not gives_scores(resolved):
        raise ModelError(
            f"reward_model_path: {resolved.given} writes text; a reward model gives scores (`raytune-ft reward` trains "
            "one)"
        )


def _json(path: Path) -> dict[str, Any]:
    """What a JSON file says; nothing, where there is none (a hub id).

    Raises:
        ModelError: if it is damaged, or holds something else than an object.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: is not valid JSON ({first_line(error)}); copy the model's files again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(found).__name__}; copy the model's files again")
    return found


def check_content(reference: str, *, with_base: bool = True) -> None:
    """Checks every file of a model, and of the base below an adapter, by its hash, where they are artifacts of ours.

    Weights that a disk or a copy has changed would load without a word. It takes about a second a gigabyte, so each
    verb does it once for what it takes, and not each process that loads a model.

    Raises:
        ArtifactError: with the files that differ.
    """
    resolved = resolve_model(reference)
    if resolved.artifact is not None:
        folder = resolved.artifact.local()
        there = (folder / name for name in resolved.artifact.manifest.files)
        stamps = [path.stat() for path in there if path.exists()]
        _check_hashes(str(folder), tuple((stamp.st_size, stamp.st_mtime_ns) for stamp in stamps))
    if resolved.adapter is not None and with_base:
        check_content(_adapter_base(resolved.adapter))


@cache
def _check_hashes(folder: str, stamps: tuple[tuple[int, int], ...]) -> None:
    """Reads the files of an artifact, once in a process as long as their sizes and times (`stamps`) stay."""
    gigabytes = sum(size for size, _ in stamps) / 1e9
    if gigabytes > _TOLD_GB:
        logger.info("%s: checking %.1f GB against its manifest", folder, gigabytes)
    open_artifact(folder, ArtifactKind.MODEL, verify="hash")


def model_parent(reference: str, role: str = "model") -> Parent:
    """The entry of a model in the manifest of what is made from it, its content checked.

    Raises:
        ArtifactError: as `check_content`.
    """
    check_content(reference)
    resolved = resolve_model(reference)
    if resolved.artifact is not None:
        return resolved.artifact.as_parent(role)
    where = str(Location.at(reference)) if Location.at(reference).exists() else reference
    return Parent(role=role, where=where, digest=resolved.digest)


def load_tokenizer(reference: str) -> Any:
    """The tokenizer of a model (the adapter's own, if it brings one).

    Raises:
        ModelError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    source = resolve_model(reference).tokenizer_source
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_unreachable(source, "tokenizer", error)) from None


def load_model(
    reference: str, *, precision: Precision = Precision.AUTO, device: str | None = None, with_adapter: bool = True
) -> LoadedModel:
    """A model ready for scoring and generation.

    Args:
        reference: folder, artifact, URI, hub id or ``starter:``; quantized folders load as they were saved.
        precision: of the weights; auto takes what the device does well (bf16 on CUDA, fp32 on CPU).
        device: ``cpu``, ``cuda``, ``cuda:1``; by default CUDA where there is one.
        with_adapter: whether an adapter folder's adapter is put upon its base.

    Raises:
        ModelError: if it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    resolved = resolve_model(reference)
    refuse_scorer(resolved)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            resolved.base,
            dtype=torch_dtype(precision, device),
            device_map={"": device},
            trust_remote_code=False,
            use_safetensors=True,
        )
    except UNREADABLE as error:
        raise ModelError(model_problem(resolved.base, error)) from None
    if resolved.adapter is not None and with_adapter:
        model = put_adapter(model, resolved.adapter, device)
    tokenizer = load_tokenizer(reference)
    return LoadedModel(model.eval(), tokenizer, Chat(tokenizer), resolved, device)


def quiet_transformers() -> None:
    """Turns off the bars that transformers draws while it loads and saves; our own lines say what happens."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def torch_dtype(precision: Precision, device: str) -> Any:
    """The torch number format that `precision` means on `device`."""
    import torch

    fixed = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}
    if precision in fixed:
        return fixed[precision]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


def put_adapter(model: Any, folder: Path, device: str) -> Any:
    """A PEFT model: the adapter in `folder` upon `model`.

    Raises:
        ModelError: if it is none in safetensors, does not fit, or holds something that the model has no place for.
    """
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    if not (folder / "adapter_model.safetensors").exists():
        raise ModelError(f"{folder}: has no adapter_model.safetensors (pickled adapters are not loaded)")
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), torch_device=device)
        # Once more, for what it says: the first time PEFT only warns of what it left out.
        result = set_peft_model_state_dict(adapted, load_file(folder / "adapter_model.safetensors", device=device))
    except (ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: this adapter does not fit its base model: {error}") from None
    problem = f"{folder}: parts of this adapter were not loaded upon {type(model).__name__}"
    refuse_lost(result, adapted.peft_config["default"], problem)
    return adapted


def refuse_lost(result: Any, config: Any, problem: str) -> None:
    """Checks that an adapter's tensors and its places in a model are the same.

    Args:
        result: what PEFT says of an adapter that it loaded.
        config: the adapter's PEFT configuration.
        problem: what it means if something is left.

    Raises:
        ModelError: `problem`, with what was not loaded.
    """
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    if config.is_prompt_learning:  # learned tokens are loaded apart, whole or not at all
        return
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    missing = [name for name in result.missing_keys if prefix in name or ".modules_to_save." in name]
    lost = sorted({_layer(name, prefix) for name in missing or result.unexpected_keys})
    if lost:
        raise ModelError(f"{problem} ({len(lost)}: {', '.join(lost[:4])}{', ...' if len(lost) > 4 else ''})")


def _layer(name: str, prefix: str) -> str:
    return name.partition(f".{prefix}")[0].removeprefix("base_model.model.")


def _adapter_base(folder: Path) -> str:
    base = _json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{folder}/adapter_config.json: does not name its base_model_name_or_path")
    return str(base)


def _local_folder(location: Location) -> tuple[Path, str]:
    files = location.files()
    digest = _text_digest(json.dumps({name: source_digest(location / name) for name in files}))
    if location.is_local:
        return Path(location.path), digest
    target = cache_folder() / "models" / digest
    if not (target / ".complete").exists():
        location.download(target)
        (target / ".complete").touch()
    return target, digest


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_problem(source: str, error: Exception) -> str:
    """What keeps a model from loading, in words."""
    folder = Path(source)
    if (folder / "config.json").exists():
        if any(folder.glob("pytorch_model*.bin*")) and not any(folder.glob("*.safetensors")):
            return (
                f"{source}: holds its weights pickled (pytorch_model.bin), and pickled weights are not loaded, since "
                "they can run code; where you trust them, load the model once with transformers and save it with "
                "save_pretrained, which writes model.safetensors"
            )
        if _json(folder / "config.json").get("is_encoder_decoder"):
            return (
                f"{source}: is an encoder and a decoder, no causal language model; give one that continues its text "
                "(its config.json names an architecture like LlamaForCausalLM)"
            )
    return _unreachable(source, "model", error)


def _unreachable(source: str, what: str, error: Exception) -> str:
    first = first_line(error)
    if Path(source).exists():
        return f"{source}: its {what} cannot be loaded: {first}"
    return (
        f"{source}: no {what} could be loaded under this name: {first} "
        "(Without network, give a local folder in Hugging Face layout.)"
    )
