"""The worker that vLLM starts with `--worker-cls polar_vllm.worker.Worker`.

It is vLLM's own, except that a pass with filled tokens runs in `Layered`, and that it counts what ran.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import numpy as np
import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import CommonAttentionMetadata

from polar_sdk import __version__
from polar_sdk.programs.cost import Piece
from polar_sdk.programs.program import Program
from polar_vllm.counts import Counts
from polar_vllm.forward import Layered
from polar_vllm.plan import Turn, stretches
from polar_vllm.plugin import ENDS, check_registered
from polar_vllm.settings import KEY, Settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from polar_vllm.plan import Span

_BASES: Final = {"cpu": "vllm.v1.worker.cpu_worker.CPUWorker"}
_Base: Any = resolve_obj_by_qualname(_BASES.get(current_platform.device_type, "vllm.v1.worker.gpu_worker.Worker"))


class Worker(_Base):  # type: ignore[misc]
    """The platform's worker, with programs."""

    def load_model(self, *args: Any, **options: Any) -> None:
        """Load the model, and the maps after it.

        Raises:
            ValueError: They do not fit each other, or the server's options.
        """
        check_registered()
        settings = Settings.of(self.vllm_config)
        self._digests = {**settings.check_server(self.vllm_config), "version": __version__, "worker": uuid4().hex[:16]}
        super().load_model(*args, **options)
        self.polar = Passes(self.model_runner, settings)
        self.model_runner._model_forward = self.polar.forward

    def execute_model(self, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        """Run a pass, after counting which requests have ended."""
        self.polar.counts.end(getattr(scheduler_output, ENDS))
        return super().execute_model(scheduler_output, *args, **options)

    def polar_counts(self) -> tuple[Mapping[str, int], int]:
        """The work that this worker has executed (see `Counts`), and the number of requests that run."""
        return self.polar.counts.as_dict(), self.polar.counts.running

    def polar_digests(self) -> dict[str, str]:
        """What this worker runs: fingerprint of its `model`, digest of its `fills`, our `version`; and its own id."""
        return self._digests


class Passes:
    """The passes of a runner.

    Args:
        runner: vLLM's, with its model loaded.
        settings: What it runs programs with.
    """

    def __init__(self, runner: Any, settings: Settings) -> None:
        self._runner, self._stock, self._settings = runner, runner._model_forward, settings
        assert settings.fills is not None, "checked"
        layers = runner.model.model.layers
        if any(layer.self_attn.attn.sliding_window is not None for layer in layers):
            raise ValueError(
                "polar_vllm does not run a model with a sliding window; serve it with another --worker-cls."
            )
        attention = layers[0].self_attn
        heads, dim = attention.total_num_kv_heads, attention.head_dim
        settings.fills.check(len(layers), attention.hidden_size, heads, dim)
        first = get_tensor_model_parallel_rank() * heads // get_tensor_model_parallel_world_size()
        own = slice(first, first + attention.num_kv_heads)
        self._layered = Layered(runner.model, settings.fills.part(own, runner.dtype, runner.device))
        self._identity = Program.identity(self._layered.depth)
        self._programs: dict[str, Program] = {}
        self._groups: list[Any] = []
        self.counts = Counts(self._layered.depth)

    def forward(self, input_ids: Any = None, positions: Any = None, *rest: Any, **options: Any) -> Any:
        """Run a batch: as vLLM does, or by a plan where tokens of it are filled."""
        batch = self._runner.input_batch
        requests, turns = batch.req_ids, self._turns()
        has_programs = any(turn.program is not self._identity for turn in turns)
        plan = stretches(turns, self._layered.depth) if has_programs else ()
        is_planned = any(stretch.filled for stretch in plan)
        known = batch.num_tokens_no_spec[: len(turns)].tolist()
        self.counts.add(requests, turns, known, plan if is_planned else None)
        if not is_planned:
            return self._stock(input_ids, positions, *rest, **options)
        tokens = int(self._runner.query_start_loc.np[len(turns)])
        rows = _Batch(self._runner, turns, self._builders)
        states = self._layered(input_ids[:tokens], positions[:tokens], plan, rows)
        return torch.nn.functional.pad(states, (0, 0, 0, len(input_ids) - tokens))

    def _turns(self) -> list[Turn]:
        runner = self._runner
        batch, places = runner.input_batch, runner.query_start_loc.np
        turns = []
        for row, name in enumerate(batch.req_ids):
            start = int(batch.num_computed_tokens_cpu[row])
            end = start + int(places[row + 1] - places[row])
            params = runner.requests[name].sampling_params
            # Logits are wanted of the last token that is known, and of drafts after it; or of all.
            known = int(batch.num_tokens_no_spec[row])
            wanted = end if end < known else max(start, known - 1)
            wanted = start if params is None or params.prompt_logprobs is not None else wanted
            piece = Piece(start, end, int(batch.num_prompt_tokens[row]), wanted)
            turns.append(Turn(self._program(params), piece))
        return turns

    def _program(self, params: Any) -> Program:
        text = (params.extra_args or {}).get(KEY) if params is not None else None
        if text is None:
            return self._identity
        if text not in self._programs:
            program = self._settings.program(text, self._layered.depth)
            self._programs[text] = self._identity if program == self._identity else program
        return self._programs[text]

    def _builders(self, stretch: int) -> Any:
        """The builder of attention's metadata for a stretch: one for each, as a builder keeps what it built last."""
        runner = self._runner
        if not self._groups:
            # The first token of a prompt and its end are two rows.
            self._config = copy(runner.vllm_config)
            self._config.scheduler_config = copy(self._config.scheduler_config)
            self._config.scheduler_config.max_num_seqs *= 2
        while len(self._groups) <= stretch:
            [[stock]] = runner.attn_groups
            group = replace(stock, metadata_builders=[], kernel_block_table=None)
            group.create_metadata_builders(self._config, runner.device, runner._kernel_block_sizes[0])
            self._groups.append(group)
        return self._groups[stretch]


class _Batch:
    """See `forward.Batch`."""

    def __init__(self, runner: Any, turns: Sequence[Turn], builders: Any) -> None:
        self._device, self._builders = runner.device, builders
        self._prompts = [turn.piece.prompt for turn in turns]
        self._offsets = [int(place) - turn.piece.start for place, turn in zip(runner.query_start_loc.np, turns)]  # noqa: B905
        table = runner.input_batch.block_table[0]
        self._slots, self._blocks = table.slot_mapping.gpu, table.get_device_tensor(len(turns))
        self._positions = runner.positions

    def indices(self, spans: Sequence[Span]) -> Tensor:
        found = [np.arange(start, end) + self._offsets[row] for row, start, end in spans]
        return torch.from_numpy(np.concatenate(found)).to(self._device, torch.int64)

    def slots(self, indices: Tensor) -> Tensor:
        found: Tensor = self._slots[indices]
        return found

    def attend(self, stretch: int, spans: Sequence[Span], indices: Tensor, layers: Sequence[str]) -> None:
        rows, starts, ends = np.array(spans, np.int32).T
        lengths = ends - starts
        borders = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))
        lasts = torch.from_numpy(ends.copy())
        slots = self.slots(indices)
        common = CommonAttentionMetadata(
            query_start_loc=borders.to(self._device),
            query_start_loc_cpu=borders,
            seq_lens=lasts.to(self._device),
            seq_lens_cpu_upper_bound=lasts,
            num_reqs=len(spans),
            num_actual_tokens=len(indices),
            max_query_len=int(lengths.max()),
            max_seq_len=int(ends.max()),
            block_table_tensor=self._blocks[torch.from_numpy(rows.copy()).to(self._device)],
            slot_mapping=slots,
            positions=self._positions[indices],
            is_prefilling=torch.tensor([end <= self._prompts[row] for row, _, end in spans]),
        )
        metadata, context = self._builders(stretch).build_metadata(common), get_forward_context()
        for name in layers:
            context.attn_metadata[name], context.slot_mapping[name] = metadata, slots
