"""Products in eight-bit floats: recipes, emulation, GPU kernels, and the exchange that puts them into a model.

``scaling.py`` rounds to e4m3 with scales; ``products.py`` has the formulas, recipes and gradients; ``gpu_kernels.py``
what multiplies on GPUs; ``recipe.py`` chooses by the device; ``conversion.py`` puts it into a model. ``wire.py`` packs
rows that travel between ranks.
"""

from model.fp8.conversion import Fp8Conversion, Fp8Part, convert
from model.fp8.products import BLOCKWISE, ROWWISE, DenseProduct, Emulated, Fp8GroupedProduct, Kernels, Recipe
from model.fp8.recipe import RECIPES, Fp8Choice, RecipeName, choose_kernels
from model.fp8.wire import pack_rows, unpack_rows

__all__ = [
    "BLOCKWISE",
    "RECIPES",
    "ROWWISE",
    "DenseProduct",
    "Emulated",
    "Fp8Choice",
    "Fp8Conversion",
    "Fp8GroupedProduct",
    "Fp8Part",
    "Kernels",
    "Recipe",
    "RecipeName",
    "choose_kernels",
    "convert",
    "pack_rows",
    "unpack_rows",
]
