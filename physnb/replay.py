"""Two passes that begin alike: the blocks before the first broken layer are run by the first pass alone.

C and P see the same inputs and are the same model up to the first broken layer. `guidance` runs both in one batch of a
VideoDiT, which can leave that batch halfway. Other models cannot, but their blocks are modules in lists: the pass that
makes C keeps what flows out of them, and in the pass that makes P they hand that on and compute nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from physnb.families import attention_layers

READ_AGAIN = ("vace_blocks",)  # block lists all of whose outputs are read by later blocks, not only by the next one


class SharedBlocks:
    """The blocks of `model` before attention layer `layer`, recorded in one pass and replayed in another."""

    def __init__(self, model: nn.Module, layer: int):
        self.model = model
        inner = getattr(model, "_orig_mod", model)
        paths = [layer.path.rpartition(".")[0] for layer in attention_layers(model)[:layer]]
        blocks = {path: inner.get_submodule(path) for path in dict.fromkeys(paths)}
        whole = getattr(model, "_compiled_call_impl", None) is not None or inner is not model
        # Offloading hooks replace a block's forward and count on every one to run; compiled code cannot be left.
        if whole or any("forward" in vars(b) or b._compiled_call_impl is not None for b in blocks.values()):
            blocks = {}
        self.blocks = blocks
        # A list whose blocks only feed the next one needs its last output alone: it stands in for the earlier ones.
        last = {path.rpartition(".")[0]: path for path in blocks}
        self.source = {path: path if (name := path.rpartition(".")[0]) in READ_AGAIN else last[name] for path in blocks}
        self.outputs: dict[str, Any] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside the block, a forward of the model leaves behind what the shared blocks put out."""

        def keep(path: str):
            def hook(block: nn.Module, args: tuple, output: Any) -> None:
                self.outputs[path] = output

            return hook

        self.outputs.clear()
        with ExitStack() as stack:
            for path in set(self.source.values()):
                stack.callback(self.blocks[path].register_forward_hook(keep(path)).remove)
            yield

    @contextmanager
    def replaying(self, later_half: bool = False) -> Iterator[None]:
        """Inside the block, the shared blocks put out again what was recorded; or the later half of its rows.

        Does nothing if nothing was recorded.
        """

        def rows(value: Any) -> Any:
            return value[len(value) // 2 :] if later_half and isinstance(value, Tensor) else value

        with ExitStack() as stack:
            if len(self.outputs) == len(set(self.source.values())):
                for path, block in self.blocks.items():
                    output = tree_map(rows, self.outputs[self.source[path]])
                    stack.callback(vars(block).pop, "forward")
                    block.forward = lambda *args, output=output, **kwargs: output
            yield
