#!/bin/sh
# safetensors==0.8.0, numpy==2.4.2, CPU. safetensors.numpy.save_file of a transposed array, as one writes a Flax or
# Keras kernel (in, out) under a PyTorch name (out, in).
# Expected: the array's entries in their places, as safetensors 0.7.0 writes them, or a refusal: the docstring asks for
# contiguous arrays, and safetensors.torch.save_file refuses such a tensor.
# Seen: the header has the transposed shape, the data keep the order in memory: [[0, 3], [1, 4], [2, 5]] is read back as
# [[0, 1], [2, 3], [4, 5]]. No error, no warning. So with save(). np.ascontiguousarray first is right.
# Known upstream (safetensors/safetensors 825). Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
cat > "$folder/try.py" <<'PY'
import sys

import numpy
import safetensors
from safetensors.numpy import load, load_file, save, save_file

kernel = numpy.arange(6, dtype=numpy.float32).reshape(2, 3)
file = sys.argv[1]
save_file({"weight": kernel.T}, file)
read = {"save_file": load_file(file)["weight"], "save": load(save({"weight": kernel.T}))["weight"]}
save_file({"weight": numpy.ascontiguousarray(kernel.T)}, file)
read["contiguous"] = load_file(file)["weight"]
print(safetensors.__version__, {name: value.tolist() for name, value in read.items()})
right = [numpy.array_equal(value, kernel.T) for value in read.values()]
scrambled = [numpy.array_equal(value, kernel.reshape(3, 2)) for value in read.values()]
new = right == [False, False, True] and scrambled == [True, True, False]
old = right == [True, True, True]
sys.exit(not (new if safetensors.__version__ == "0.8.0" else old))
PY
for version in 0.7.0 0.8.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install -q "safetensors==$version" numpy==2.4.2
    "$folder/$version/bin/python" "$folder/try.py" "$folder/weights.safetensors"
done
