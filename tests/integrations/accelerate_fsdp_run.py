"""One rank of an example under FSDP2; the arguments are the example and its own."""

import runpy
import sys

import accelerate
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

import lagless


class Sharded(accelerate.Accelerator):
    """Accelerate shards on accelerators only: it is told so here, and everything after that is its own."""

    distributed_type = DistributedType.FSDP
    is_fsdp2 = True

    def __init__(self, **settings):
        super().__init__(**settings)
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="SHARDED_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )


class Watched(lagless.Averager):
    def save(self, path):
        assert self.sharded
        super().save(path)


if __name__ == "__main__":
    accelerate.Accelerator, lagless.Averager = Sharded, Watched
    runpy.run_path(sys.argv[1])["main"](sys.argv[2:])
