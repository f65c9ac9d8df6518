"""What an attached adapter adds to each module is what `CanonicalAdapter.forward` defines."""

import pytest
import torch
from tiny_adapters import SMALL, host_bank, random_adapter
from tiny_hosts import SENTENCES, tiny_host

from uhl_cli.adapter.attach import attach
from uhl_cli.adapter.canonical import CanonicalAdapter, size_gains
from uhl_cli.adapter.fold import fold
from uhl_cli.adapter.module import READERS, PortedAdapter
from uhl_cli.align.alignment import align_anchors
from uhl_cli.host.encode import encode
from uhl_cli.host.hostmap import read_layer_input


class Watched:
    """A host that runs once with a random adapter: streams, and what is added where, by layer and module type."""

    def __init__(self, family, dense):
        self.host = tiny_host(family)
        bank, states = host_bank(self.host)
        self.alignment = align_anchors(bank, states)
        self.adapter = random_adapter()
        with torch.no_grad():
            self.adapter.get_parameter("delta_theta").normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
            self.stored = self.adapter.stored()
            self.folded = fold(self.stored, self.alignment, self.host.map)
        self.gains = size_gains(self.stored, self.host.hidden_size)
        self.streams, self.before, self.added = {}, {}, {}
        self._watch("before")
        with torch.no_grad(), attach(self.host.map, self.folded, dense=dense) as attachment:
            self._watch("after")
            self.final = self.host.map.base(**encode(self.host, SENTENCES[:6]).model_inputs()).last_hidden_state
            self.features = attachment.readout_features(self.final)

    def _watch(self, when):
        for layer in self.host.map.layers:
            if when == "before":
                layer.module.register_forward_pre_hook(self._stream(layer.index), with_kwargs=True)
            for kind, linear in layer.target_modules.items():
                if kind in READERS and not linear.fused:
                    linear.module.register_forward_pre_hook(self._input(when, layer.index, kind))
                else:
                    linear.edited.register_forward_hook(self._output(when, layer.index, kind, linear.columns))

    def _stream(self, index):
        return lambda _, args, kwargs: self.streams.update({index: read_layer_input(args, kwargs)})

    def _input(self, when, index, kind):
        return lambda _, args: self._seen(when, (index, kind), args[0])

    def _output(self, when, index, kind, columns):
        return lambda _, _args, output: self._seen(when, (index, kind), output[..., columns])

    def _seen(self, when, key, value):
        if when == "before":
            self.before[key] = value
        else:
            self.added[key] = value - self.before[key]

    def read(self, maps, states, mean):
        return self.gains[0] * ((states - mean) @ maps.read.T)

    def defined(self, index, kind, **changes):
        """The edit of a module by the definition; `changes` are of the arguments of `forward`."""
        layer, maps = self.host.map.layers[index], self.alignment.layers[index]
        linear = layer.target_modules[kind]
        written = None if kind in READERS else self.read(maps, self.before[index, kind], 0)
        arguments = {"depth": maps.depth, "update_type": kind, "written": written} | changes
        found = self.adapter(self.read(maps, self.streams[index], maps.mean), **arguments)
        write = {"stream": maps.write_stream, "mlp": maps.write_mlp, "attention": maps.write_attention}[linear.space]
        edit = (self.gains[1] * found) @ write.T
        return edit @ linear.weight().T if linear.fused else edit


@pytest.mark.parametrize("dense", [False, True], ids=["gathered", "dense"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])  # gpt2 has fused modules, llama a gate
def test_every_module_gets_the_update_that_forward_defines(family, dense):
    watched = Watched(family, dense)
    assert len(watched.added) == sum(len(layer.target_modules) for layer in watched.host.map.layers)
    with torch.no_grad():
        for (index, kind), added in watched.added.items():
            assert added.abs().max() > 1e-3
            torch.testing.assert_close(watched.defined(index, kind), added, atol=2e-4, rtol=1e-3)
            other = "k" if kind == "q" else "q"
            size = float(added.norm())
            assert (watched.defined(index, kind, update_type=other) - added).norm() > 0.05 * size
            if kind not in READERS:  # its atoms do not respond to the stream that enters the layer
                assert (watched.defined(index, kind, written=None) - added).norm() > 0.05 * size


def test_the_readout_is_edited_in_canonical_space_itself():
    watched = Watched("bert", False)
    folded, maps = watched.folded, watched.alignment.layers[-1]
    silent = folded.readout.changed(layer=None, shift=None)
    with (
        torch.no_grad(),
        attach(watched.host.map, PortedAdapter(folded.threshold, folded.by_layer, silent)) as attachment,
    ):
        watched.host.map.base(**encode(watched.host, SENTENCES[:6]).model_inputs())
        added = watched.features - attachment.readout_features(watched.final)
        z = watched.read(maps, watched.final, maps.mean)
        weight = watched.stored["readout_in_weight"][:, -SMALL.canonical_size :]
        torch.testing.assert_close(
            watched.adapter(z, depth=1.0, update_type="readout") @ weight.T, added, atol=2e-4, rtol=1e-3
        )
        other = watched.adapter(z, depth=0.0, update_type="readout") @ weight.T
        assert (other - added).norm() > 0.05 * added.norm()


def test_a_new_adapter_adds_nothing_and_a_state_does_not_depend_on_its_batch():
    states = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not CanonicalAdapter(SMALL)(states, depth=0.5, update_type="q").any()
        adapter = random_adapter()
        whole = adapter(states, depth=0.5, update_type="q")
        assert whole.shape == states.shape
        assert whole.any()
        torch.testing.assert_close(adapter(states[1, 2], depth=0.5, update_type="q"), whole[1, 2])
