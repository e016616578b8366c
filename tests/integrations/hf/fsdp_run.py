"""One rank of runs under FSDP2; the argument is their folder."""

import sys
from pathlib import Path

import torch
import trl
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import Trainer, TrainerCallback

from lagless import BEMA, EMA
from lagless.integrations.transformers import AveragingCallback

RULES = {"bema": BEMA.paper(update_freq=2), "ema": EMA(decay=0.8)}
SAVING = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
BEST = {"metric_for_best_model": "eval_ema_loss", "load_best_model_at_end": True, "learning_rate": 0.03}


class Sharded(Trainer):
    """Accelerate shards on accelerators only: its state is told so here, and everything after that is its own."""

    plugin = {"state_dict_type": "SHARDED_STATE_DICT"}

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
            **self.plugin,
        )
        self.args.fsdp_config = {"activation_checkpointing": False}  # the plugin's counts
        self.is_fsdp_enabled = True


class Checkpointed(Sharded):
    plugin = {"state_dict_type": "FULL_STATE_DICT", "activation_checkpointing": True}


class Interrupt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def whole(named):
    """Plain tensors under the names that a model has before it is wrapped."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): tensor.detach().full_tensor().clone() for name, tensor in named
    }


def main(folder):
    sys.path.insert(0, str(Path(__file__).parent))
    import conftest as hf

    AcceleratorState.is_fsdp2 = property(lambda state: True)
    Accelerator.distributed_type = property(lambda accelerator: DistributedType.FSDP)
    torch.set_num_threads(1)

    class Recorder(hf.Recorder):
        def on_train_begin(self, args, state, control, model, **kwargs):
            self.iterates = [whole(model.named_parameters())]

        def on_step_end(self, args, state, control, model, **kwargs):
            self.iterates.append(whole(model.named_parameters()))

    def make(name, kind, callbacks, **settings):
        settings = {"ddp_backend": "gloo"} | SAVING | settings
        return hf.make_trainer(Path(folder, name), callbacks, kind=kind, **settings)

    for kind in (Sharded, Checkpointed):
        callback, recorder = AveragingCallback(RULES, export_at_save=True), Recorder()
        trainer = make(f"{kind.__name__}-whole", kind, [callback, recorder])
        trainer.train()
        names = [name for name, _ in trainer.model.named_parameters()]
        assert trainer.args.world_size == 2 and callback.averager.sharded and callback.averager.step == 8
        assert any("_checkpoint_wrapped_module" in name for name in names) == (kind is Checkpointed)
        for name, rule in RULES.items():
            read = whole(callback.averager.named_averages(name))
            hf.close(read, recorder.average(rule))
            if trainer.args.process_index == 0:
                torch.save(read, Path(folder, f"{kind.__name__}-whole-{name}.pt"))
                torch.save(recorder.average(rule, at=4), Path(folder, f"{kind.__name__}-4-{name}.pt"))
        assert [entry["step"] for entry in trainer.state.log_history if "eval_bema_loss" in entry] == [4, 8]

        try:
            make(f"{kind.__name__}-stopped", kind, [AveragingCallback(RULES), Interrupt()]).train()
        except KeyboardInterrupt:
            make(f"{kind.__name__}-stopped", kind, [AveragingCallback(RULES)]).train(resume_from_checkpoint=True)

        recorder = Recorder()
        trainer = make(f"{kind.__name__}-best", kind, [AveragingCallback(RULES), recorder], max_steps=12, **BEST)
        trainer.train()
        held = whole(trainer.model.named_parameters())
        assert trainer.state.best_global_step < 12
        hf.close(held, recorder.average(RULES["ema"], at=trainer.state.best_global_step))
        if trainer.args.process_index == 0:
            torch.save(held, Path(folder, f"{kind.__name__}-best-ema.pt"))

    theirs = make("theirs", Sharded, [trl.BEMACallback(update_freq=2)])
    try:
        theirs.train()
    except Exception as error:
        assert theirs.state.global_step == 0
        Path(folder, f"theirs-{theirs.args.process_index}.txt").write_text(f"{type(error).__name__}: {error}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
