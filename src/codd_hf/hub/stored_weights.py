"""Whether stored weights are those that a configuration describes.

transformers draws the weights that a file lacks, passes over those that it does not know, casts
those of another kind, and allocates whatever a configuration says. A model is nothing without any
of its weights, and a configuration that somebody else wrote must not decide how much memory is
taken. So sizes are compared before anything is allocated, and what transformers reports afterwards
is an error.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_codd import MOST_LAYERS, check_counts, one_sentence_for

if TYPE_CHECKING:
    from .repositories import Repository

FORMATS = (("model", "safetensors"), ("pytorch_model", "bin"))
LISTED = 4
"""So many weights are named in an error."""
FEW_LAYERS = 1024
"""Models may have so many layers whatever their files hold: some share the weights of layers."""
FEW_ELEMENTS = 1 << 20
"""So many elements may be computed from a configuration, as tables of positions are."""


class StoredWeights(NamedTuple):
    """The weights that transformers would load.

    Attributes:
        name: the folder or id of the model.
        floating: whether each is floating-point, by its name; None where no files are there.
        num_bytes: the size of the files.
    """

    name: str
    floating: dict[str, bool] | None
    num_bytes: int = 0

    @classmethod
    def find(cls, repository: Repository, kwargs: dict[str, Any]) -> StoredWeights:
        """Reads the names of the weights; `kwargs` are the arguments of a `from_pretrained`.

        Raises:
            OSError: a file is damaged, or names another one that is not there.
        """
        safe, variant = kwargs.get("use_safetensors"), kwargs.get("variant")
        infix = "" if variant is None else f".{variant}"
        for stem, ending in FORMATS if kwargs.get("gguf_file") is None else ():
            if safe is not None and safe != (ending == "safetensors"):
                continue
            file, index = f"{stem}{infix}.{ending}", f"{stem}.{ending}.index{infix}.json"
            files = [file]
            if repository.find(file) is None:
                path = repository.find(index)
                if path is None:
                    continue
                files = repository.read(Path(path))
            floating: dict[str, bool] = {}
            num_bytes = 0
            for file in files:
                path = repository.find(file)
                if path is None:
                    raise OSError(
                        f"{index!r} in {repository.name!r} names the file {file!r}, which is not "
                        "beside it: save it or download it again."
                    )
                floating |= repository.read(Path(path))
                num_bytes += Path(path).stat().st_size
            return cls(repository.name, floating, num_bytes)
        return cls(repository.name, None)

    def check_layers(self, fields: dict[str, Any]) -> None:
        """Raises for the content of a `config.json` with more layers than the files can hold.

        To be asked before a configuration is made of it: transformers makes lists of the layers.
        """
        most = MOST_LAYERS if self.floating is None else max(FEW_LAYERS, len(self.floating))
        where = f"in the configuration of {self.name!r}, whose files hold no more"
        check_counts(fields, most, where)

    def load(
        self,
        load: Callable[..., tuple[PreTrainedModel, dict[str, Any]]],
        config: PreTrainedConfig | None,
        build: Callable[..., PreTrainedModel] | None,
        /,
        unused: str | None = None,
        may_lack: bool = False,
        **kwargs: Any,
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Loads the weights, all of them and no others, or raises.

        Args:
            load: transformers' `from_pretrained`.
            config: the configuration.
            build: makes a model of a configuration; it is called on the meta device. None where the
                class is known only as it is loaded.
            unused: a pattern of the names of weights that the model may leave aside.
            may_lack: whether the model may have weights that are not stored.
            **kwargs: for `load`, its own `config` among them.

        Returns:
            The model, and the report of transformers.

        Raises:
            ValueError: the weights are others, or the configuration describes no model.
        """
        sizes_may_differ = kwargs.pop("ignore_mismatched_sizes", False)
        if build is not None and self.floating is not None and not sizes_may_differ:
            with one_sentence_for(f"the configuration in {self.name!r}"), torch.device("meta"):
                model = build(copy.deepcopy(config))
            self._check(model, self.floating, kwargs.get("key_mapping") or {})
        # Other sizes pass here: they are told with all else that the report holds.
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = load(self.name, **kwargs)
        shapes = [] if sizes_may_differ else sorted(report["mismatched_keys"])
        unexpected = sorted(report["unexpected_keys"])
        if unused is not None:
            unexpected = [key for key in unexpected if not re.search(unused, key)]
        self._refuse("of another shape", [f"{k} {tuple(a)}, not {tuple(b)}" for k, a, b in shapes])
        self._refuse("missing", [] if may_lack else sorted(report["missing_keys"]))
        self._refuse("in no place of the model", unexpected)
        return model, report

    def _check(
        self, model: PreTrainedModel, floating: dict[str, bool], key_mapping: dict[str, str]
    ) -> None:
        """Raises unless the files can hold a model on the meta device."""
        weights, buffers = model.state_dict(), dict(model.named_buffers())
        computed = max((b.numel() for name, b in buffers.items() if name not in weights), default=0)
        needed = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
        needed += sum(b.numel() for name, b in buffers.items() if name in weights)
        packed = getattr(model.config, "quantization_config", None) is not None
        held = self.num_bytes * (8 if packed else 1)  # a weight takes a byte, or packed a bit
        if needed > held or computed > held + FEW_ELEMENTS:
            raise ValueError(
                f"The configuration in {self.name!r} describes {max(needed, computed):,} weights, "
                f"but its files have {self.num_bytes:,} bytes: download or save them again."
            )
        for pattern, replacement in key_mapping.items():
            floating = {re.sub(pattern, replacement, key): kind for key, kind in floating.items()}
        kinds = {key: weight.is_floating_point() for key, weight in weights.items()}
        others = [key for key, kind in kinds.items() if floating.get(key, kind) != kind]
        self._refuse("of another kind of number", [] if packed else others)

    def _refuse(self, fault: str, weights: list[str]) -> None:
        """Raises for weights with a fault, if there are any."""
        if weights:
            more = f" and {len(weights) - LISTED} more" if len(weights) > LISTED else ""
            raise ValueError(
                f"The weights in {self.name!r} are not those that its configuration "
                f"(`config.json`) describes: {', '.join(weights[:LISTED])}{more} {fault}."
            )


def floating_weights(path: Path) -> dict[str, bool]:
    """Whether each weight of a file is floating-point; no code in it is run."""
    if path.suffix == ".bin":
        weights = torch.load(path, map_location="meta", weights_only=True)
        return {k: t.is_floating_point() for k, t in weights.items() if hasattr(t, "dtype")}
    with safe_open(path, "pt") as file:
        dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    return {key: dtype[0] == "F" or dtype[:2] == "BF" for key, dtype in dtypes.items()}
