"""Script of test_hf_io.py for a separate process: FOLDER. Prints "whole" last if all is read once, into its shards."""

import sys
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

from pathflip_jax.convert import decoder as hf_io
from pathflip_jax.convert.decoder_names import names
from pathflip_jax.convert.lora import adapters, attach
from pathflip_jax.llm.config import LoRAConfig
from pathflip_jax.model.parameters import flatten
from pathflip_jax.runtime.sharding import make_mesh

if __name__ == "__main__":
    assert jax.device_count() == 8
    folder = Path(sys.argv[1])
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    size = sum(tensor.nbytes for tensor in tensors.values())
    read_slice, read = hf_io.read_slice, []
    hf_io.read_slice = lambda *of: read.append(read_slice(*of)) or read[-1]

    mesh = make_mesh(data=-1, fsdp=4)
    decoder = hf_io.load_decoder(folder, mesh=mesh, lora=LoRAConfig(rank=2))
    flat = flatten(decoder)
    assert sum(part.nbytes for part in read) == size, (sum(part.nbytes for part in read), size)
    # Kernels and the table in four, each read by itself; norms and biases whole, read once for all devices.
    whole = [part for part in read if part.nbytes in {tensor.nbytes for tensor in tensors.values() if tensor.ndim == 1}]
    assert len(read) == 4 * sum(tensor.ndim == 2 for tensor in tensors.values()) + sum(
        x.ndim == 1 for x in tensors.values()
    )
    assert whole and max(part.nbytes for part in read) < max(tensor.nbytes for tensor in tensors.values()) / 3
    for name in names(decoder.config):
        array, tensor = flat[name.path], name.to_jax(tensors[name.torch])
        np.testing.assert_array_equal(array, tensor)
        shard = array.addressable_shards[0].data.shape
        assert len(array.sharding.device_set) == 8
        assert shard == ((tensor.shape[0] // 4, *tensor.shape[1:]) if tensor.ndim == 2 else tensor.shape), name
    adapter = adapters(flat)
    attached = attach(flat, {name: np.asarray(array) for name, array in adapter.items()})
    assert len(adapter) == 28
    for name, array in adapter.items():
        assert len(array.sharding.device_set) == 8 and attached[name].sharding == array.sharding, name

    made = flatten(hf_io.init_decoder(decoder.config, 0, mesh=mesh))
    for name, array in made.items():
        assert array.sharding == flat[name].sharding, name

    hf_io.save_decoder(decoder, folder / "again", source=folder)
    again = load_file(folder / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor)
    assert not {"torch", "transformers", "peft"} & set(sys.modules)
    print("whole")
