"""Training: optimizers and learning rates by name, the step, the loop, evaluation, checkpoints, and whole runs."""

from edgejax.train.batches import DatasetBatches, StepBatches
from edgejax.train.checkpoint import Checkpoints, RunIdentity, nonfinite_leaves, tree_sha256
from edgejax.train.evaluate import EvalResult, evaluate, evaluate_with
from edgejax.train.finetune import FinetuneResult, finetune
from edgejax.train.identity import ModelLike, check_same_run, run_config, run_identity
from edgejax.train.layerwise import make_layerwise_step
from edgejax.train.layerwise_state import init_layerwise
from edgejax.train.learning_rate import SCHEDULES, make_schedule, rates, warmup_steps
from edgejax.train.loop import LoopResult, StepFigures, train_loop
from edgejax.train.mesh import MeshShape, make_mesh, parse_mesh
from edgejax.train.metrics import MetricsLog, read_metrics
from edgejax.train.optimizers import decay_mask, make_optimizer, optimizer_names
from edgejax.train.placement import (
    MeshReceipt,
    bytes_per_device,
    mesh_receipt,
    shard_batch,
    shard_state,
    shard_tree,
)
from edgejax.train.processes import joined
from edgejax.train.programs import Programs, compile_programs
from edgejax.train.progress import LiveProgress, PlainProgress, Progress, SilentProgress
from edgejax.train.run_folder import RunFolder, is_run_folder, read_config, write_json
from edgejax.train.settings import TrainSettings
from edgejax.train.sharded import make_sharded_eval_step, make_sharded_step, start_over_mesh
from edgejax.train.signals import SignalGuard
from edgejax.train.state import TrainState, init_state
from edgejax.train.streamed import LayerSource, make_streamed_eval, make_streamed_step
from edgejax.train.whole import Mode, make_eval_step, make_train_step, split_parameters

__all__ = [
    "SCHEDULES",
    "Checkpoints",
    "DatasetBatches",
    "EvalResult",
    "FinetuneResult",
    "LayerSource",
    "LiveProgress",
    "LoopResult",
    "MeshReceipt",
    "MeshShape",
    "MetricsLog",
    "Mode",
    "ModelLike",
    "PlainProgress",
    "Programs",
    "Progress",
    "RunFolder",
    "RunIdentity",
    "SignalGuard",
    "SilentProgress",
    "StepBatches",
    "StepFigures",
    "TrainSettings",
    "TrainState",
    "bytes_per_device",
    "check_same_run",
    "compile_programs",
    "decay_mask",
    "evaluate",
    "evaluate_with",
    "finetune",
    "init_layerwise",
    "init_state",
    "is_run_folder",
    "joined",
    "make_eval_step",
    "make_layerwise_step",
    "make_mesh",
    "make_optimizer",
    "make_schedule",
    "make_sharded_eval_step",
    "make_sharded_step",
    "make_streamed_eval",
    "make_streamed_step",
    "make_train_step",
    "mesh_receipt",
    "nonfinite_leaves",
    "optimizer_names",
    "parse_mesh",
    "rates",
    "read_config",
    "read_metrics",
    "run_config",
    "run_identity",
    "shard_batch",
    "shard_state",
    "shard_tree",
    "split_parameters",
    "start_over_mesh",
    "train_loop",
    "tree_sha256",
    "warmup_steps",
    "write_json",
]
