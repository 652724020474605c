"""A recorded step on real ranks, to hold a simulated one against; workers must be able to import it."""

from pensar.base.ranks import World
from pensar.model.config import ModelConfig
from pensar.model.qwen3 import Qwen3, initialize
from pensar.train.footprint import Step
from pensar.train.layout import Layout
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.parallel.optimizer import ShardedOptimizer
from pensar.train.parallel.run import opened_mesh, spread_model
from pensar.train.parallel.shard import from_seed
from pensar.train.parallel.step import Meshed
from pensar.train.recompute import recomputed
from pensar.train.recorder import Exchange, Recorder
from pensar.train.simulate import Moments, dimensions, even_batches, record


def recorded(world: World, model: ModelConfig, layout: Layout, step: Step) -> tuple[Moments, list[Exchange]]:
    """What rank 0 holds and sends in a real step of random weights, in float32."""
    config, batches = OptimizerConfig(muon=step.muon), even_batches(model, layout, step)
    if world.size == 1:
        module = Qwen3(model).train()
        initialize(module, 1)
        with recomputed(module, layout.recompute), Recorder({model.vocab_size}) as recorder:
            return record(module, Optimizer(module, config), batches, world, recorder, step), []
    with opened_mesh(world, layout) as mesh:
        module = spread_model(model, mesh, from_seed(model, 1))
        optimizer, spread = ShardedOptimizer(module, config, mesh), Meshed(mesh)
        widths = {model.vocab_size, model.vocab_size // layout.tp}
        with recomputed(module, layout.recompute), Recorder(widths, dimensions(mesh)) as recorder:
            moments = record(module, optimizer, batches, spread, recorder, step)
            return moments, recorder.exchanges()
