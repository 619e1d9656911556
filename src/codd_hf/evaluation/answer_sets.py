"""What a pipeline answers to the same questions under several settings, each answer made once."""

import json
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..backbones import block_length_of
from ..data.fingerprint import json_fingerprint, pipeline_fingerprint
from ..decoding.call import DEFAULT_LENGTH
from ..pipelines.pipeline_codd import CoDDPipeline
from ..runtime.files import append_results, read_results
from . import FACTORIZED, AnsweringSettings


class Answer(NamedTuple):
    """A text, its tokens without end-of-text, its passes, and its share of its batch's seconds."""

    text: str
    tokens: list[int]
    passes: int = 0
    seconds: float = 0.0


class AnswerSet:
    """Answers to some questions, in their order, which are kept in `OUTPUT.answers`.

    Row `i` is answered by process `i % num_processes`, with the seed of the settings plus `i`;
    neither process nor batch changes it. The `name` is of the questions, and of their files;
    `gen_length` is the settings', or else the pipeline's own.

    Raises:
        ValueError: the answers that are there are of other questions, settings or another model.
    """

    def __init__(
        self, name: str, pipeline: CoDDPipeline, questions: Sequence[str], settings: Any
    ) -> None:
        self.pipeline, self.questions, self.settings = pipeline, questions, settings
        self.state, self.file, self.kept = PartialState(), None, dict[Any, Any]()
        own = pipeline.task().get("gen_length", DEFAULT_LENGTH)
        self.gen_length: int = settings.gen_length or own
        if settings.output is None:
            return
        given = [*questions, self.gen_length, settings.seed, pipeline_fingerprint(pipeline)]
        run, folder = json_fingerprint(given), Path(f"{settings.output}.answers")
        folder.mkdir(exist_ok=True)
        for path in sorted(folder.glob(f"{name}-*.jsonl")):
            self.kept |= read_results(path)
            if self.kept.setdefault("run", run) != run:
                raise ValueError(
                    f"{str(folder)!r} has answers of another model, dataset, length or seed: take "
                    "the same to go on, give another `output`, or delete it."
                )
        self.file = folder / f"{name}-{self.state.process_index:05d}.jsonl"
        append_results(self.file, [("run", run)])

    def answers(self, passes: int, sampling: str, **draw: Any) -> list[Answer]:
        """Those under some draw settings, by default the scheduler's; all processes call it.

        Each is made in `passes` passes per window of the head, or fewer where a strategy is
        adaptive or a text ends. Factorized decoding has the temperature of the backbone, whatever
        the scheduler's for the circuit is.
        """
        settings, window = self.settings, self.pipeline.model.window_length
        draw = {"sampling": sampling, **draw}
        if sampling == FACTORIZED:
            draw["evidence_temperature"] = 1.0
        ends, cell = self.pipeline.task()["eos_token_id"], json.dumps([passes, draw])
        mine = range(self.state.process_index, len(self.questions), self.state.num_processes)
        left = [i for i in mine if f"{cell} {i}" not in self.kept]
        made: dict[str, Answer] = {}
        size = settings.batch_size
        for start in tqdm(range(0, len(left), size), sampling, leave=False, disable=None):
            batch, started = left[start : start + size], time.perf_counter()
            output: Any = self.pipeline(
                [self.questions[i] for i in batch],
                gen_length=self.gen_length,
                block_length=block_length(self.pipeline),
                num_inference_steps=passes * -(-self.gen_length // window),
                generator=[torch.Generator().manual_seed(settings.seed + i) for i in batch],
                **draw,
            )
            seconds = (time.perf_counter() - started) / len(batch)
            rows = output.sequences.tolist(), output.passes_per_row.tolist()
            new = {
                f"{cell} {i}": Answer(text, [*takewhile(lambda t: t not in ends, row)], n, seconds)
                for i, text, row, n in zip(batch, output.texts, *rows, strict=True)
            }
            if self.file is not None:
                append_results(self.file, new.items())
            made |= new
        for new in gather_object([made]):
            self.kept |= new
        return [Answer(*self.kept[f"{cell} {i}"]) for i in range(len(self.questions))]


def ways(pipeline: CoDDPipeline, settings: AnsweringSettings) -> list[tuple[str, str, int]]:
    """Sampling mode, strategy and passes of all that is measured; without a head, factorized alone.

    Raises:
        ValueError: there are more passes than tokens in a window, or fewer than blocks.
    """
    length, own = pipeline.model.window_length, pipeline.scheduler.settings
    least = -(-length // block_length(pipeline))
    powers = [1 << i for i in range(length.bit_length()) if 1 << i >= least]
    all_passes = settings.passes or powers or [length]
    if not least <= min(all_passes) <= max(all_passes) <= length:
        raise ValueError(
            f"`passes` must be from {least}, one a block, to the window's {length}, got "
            f"{settings.passes}."
        )
    coupled: Any = (settings.samplings or [own.sampling]) if pipeline.model.coupling_head else []
    return [
        (mode, strategy, passes)
        for mode in dict.fromkeys([FACTORIZED, *coupled])
        for strategy in settings.strategies or [own.strategy]
        for passes in all_passes
    ]


def block_length(pipeline: CoDDPipeline) -> int:
    """What is decoded together: a window, of a block-causal backbone what its family decodes."""
    attended = block_length_of(pipeline.model.config.text_config)
    if attended is None:
        return pipeline.model.window_length
    return pipeline.task().get("block_length") or attended
