"""One rank of a run under DDP; the argument is its folder."""

import sys
from pathlib import Path

import torch

from lagless import BEMA, EMA
from lagless.integrations.transformers import AveragingCallback


def main(folder):
    sys.path.insert(0, str(Path(__file__).parent))
    import conftest as hf

    torch.set_num_threads(1)
    rules = {"bema": BEMA.paper(update_freq=2), "ema": EMA(decay=0.8)}
    callback, recorder = AveragingCallback(rules, export_at_save=True), hf.Recorder()
    saving = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    best = {"metric_for_best_model": "eval_ema_loss", "load_best_model_at_end": True, "learning_rate": 1e-3}
    trainer = hf.make_trainer(folder, [callback, recorder], ddp_backend="gloo", **saving | best)
    trainer.train()
    assert trainer.args.world_size == 2 and trainer.state.best_global_step == 8
    hf.close(hf.weights(trainer.model), recorder.average(rules["ema"]))
    torch.save(hf.weights(trainer.model), Path(folder, f"rank{trainer.args.process_index}.pt"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
