"""`LanguageModel`: a causal language model with its tokenizer, ready to be scored on texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from weightops.algebra.devices import pick_device
from weightops.algebra.precision import Precision, computed_in, pick_precision
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.errors import TaskError
from weightops.evaluation.image_model import check_finite
from weightops.evaluation.perplexity import check_causal, in_blocks, language_architecture
from weightops.evaluation.units import PERPLEXITY
from weightops.support.lazy import F, nn, torch, without_gradients
from weightops.support.progress import progress
from weightops.tasks.texts import TextTask

LENGTH = 256
"""The longest block, in tokens: shorter blocks are more samples to compare edits on."""
FEWEST, SHORTEST = 16, 8
"""The fewest blocks of a split, for which they are made shorter, and the shortest, in tokens."""


@dataclass(eq=False)
class LanguageModel:
    """A causal language model of transformers with its tokenizer.

    Attributes:
        module: takes ``input_ids`` and returns an object with ``logits``.
        device: the device of the module.
        base: the checkpoint that the module was built from.
        precision: what the module is run in.
    """

    module: Any
    device: torch.device
    base: Checkpoint
    precision: str = "float32"
    _blocks: dict[tuple[TextTask, str], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        model: CheckpointLike | LanguageModel,
        device: str = "auto",
        *,
        precision: Precision = "auto",
    ) -> LanguageModel:
        """Build the model of a checkpoint whose architecture is known.

        Raises:
            CheckpointError: if it isn't a causal language model of transformers.
        """
        if isinstance(model, LanguageModel):
            return model if precision == "auto" else model.in_precision(precision)
        checkpoint, where = open_checkpoint(model), pick_device(device)
        _ = language_architecture(checkpoint).context  # other libraries have none
        module = checkpoint.model().to(where).eval()
        check_causal(module, checkpoint.ref)
        return cls(module, where, checkpoint, pick_precision(precision, where))

    def in_precision(self, precision: Precision) -> LanguageModel:
        """Return the same model, run in another precision."""
        return replace(self, precision=pick_precision(precision, self.device))

    @property
    def trained(self) -> tuple[nn.Module, str]:
        """The part that is fine-tuned, and what its names begin with: all of it."""
        return self.module, ""

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the model tells apart."""
        return int(self.module.config.get_text_config().vocab_size)

    def blocks(self, task: TextTask, split: str) -> torch.Tensor:
        """Return the blocks of a split, which are kept: see `text_blocks`."""
        if (task, split) not in self._blocks:
            self._blocks[task, split] = text_blocks(self.base, task, split)
        return self._blocks[task, split]

    @without_gradients
    def log_likelihoods(
        self,
        task: TextTask,
        split: str,
        *,
        batch_size: int = 8,
        only: npt.NDArray[np.int64] | None = None,
    ) -> torch.Tensor:
        """Return the mean log-likelihood of a token in each block, in nats, shape ``(n,)``.

        All tokens of a block count but the first, and each block is read without those before it.

        Args:
            task: the text.
            split: "test", "validation" or "train".
            batch_size: blocks at a time.
            only: indices of the blocks; all by default.

        Raises:
            NonfiniteError: if logits are NaN or infinite.
        """
        blocks = self.blocks(task, split)
        blocks = blocks if only is None else blocks[torch.from_numpy(only)]
        found, bad = [torch.empty(0)], [torch.empty(0, dtype=torch.bool)]
        for batch, logits in self.logits(blocks, batch_size, f"{task.name} {split}"):
            bad.append(~logits.isfinite().flatten(1).all(1).cpu())
            found.append(token_log_likelihoods(logits, batch).mean(1).cpu())
        check_finite(torch.cat(bad), f"the logits of {task.name} {split}")
        return torch.cat(found)

    def logits(
        self, blocks: torch.Tensor, batch_size: int, title: str
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield blocks with their logits of shape ``(batch_size, length, vocabulary)`` or fewer."""
        self.module.eval()
        with progress(len(blocks), title, "blocks", work=1) as bar:
            for batch in blocks.split(batch_size):  # type: ignore[no-untyped-call]
                batch = batch.to(self.device)
                with torch.no_grad(), computed_in(self.precision, self.device):
                    logits = self.module(input_ids=batch).logits
                yield batch, logits.float()
                bar.update(len(batch))

    def record(
        self, task: TextTask, split: str, scores: dict[str, Any], fingerprint: str | None = None
    ) -> dict[str, Any]:
        """Return a result with all that it depends on."""
        return {
            "dataset": task.name,
            "model": self.base.ref,
            "pretrained": fingerprint or self.base.fingerprint,
            "task": "perplexity",
            "metrics": dict(scores),
            "split": split,
            "precision": self.precision,
            **task.reading(split),
        }


def text_blocks(model: Checkpoint, task: TextTask, split: str) -> torch.Tensor:
    """Return the tokens of a split in blocks, shape ``(n, length)``.

    The length is 256, or the model's context if that is shorter; of a split that has less than 16
    such blocks, a sixteenth of its tokens. Tokens after the last block aren't used.

    Raises:
        CheckpointError: if the model isn't one of transformers with a tokenizer.
        TaskError: if a sixteenth of the split has less than 8 tokens.
    """
    architecture = language_architecture(model)
    context, tokens = architecture.context, architecture.tokens(task.text(split))
    length = min(LENGTH, context, len(tokens) // FEWEST)
    if length < SHORTEST:
        raise TaskError(
            f"{task.name} has {len(tokens)} tokens for {split}, and {FEWEST * SHORTEST} are needed",
            hint="a longer text",
        )
    return in_blocks(tokens, length)


def token_log_likelihoods(logits: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Return the log-likelihood of each token but a block's first, shape ``(n, length - 1)``."""
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten(), reduction="none"
    )
    return -losses.view(len(blocks), -1)


def text_metrics(values: torch.Tensor, length: int) -> dict[str, Any]:
    """Return ``perplexity``, ``n`` blocks and their ``length``, given the values of all blocks."""
    perplexity = PERPLEXITY.reading(values.double().mean().item())
    return {"perplexity": perplexity, "n": len(values), "length": length}
