"""Everything that touches Megatron-Core. No other package imports it."""

import warnings

from nemo_vlm.mcore import cpu

# Megatron tells at import, module by module, that Apex and Transformer Engine are missing; mcore.layers decides.
for message in (
    "Apex is not installed",
    "transformer_engine not found",
    ".*Falling back to Torch",
    ".*cuda.*not available",
    "`sequence_parallel` is set to `True`, but",  # of experts that each tensor-parallel rank has whole
):
    warnings.filterwarnings("ignore", message)

cpu.import_megatron()

from megatron.core.msc_utils import MultiStorageClientFeature  # noqa: E402

# Energon brings it along; it would then stand between Megatron and files, and leave what was broken off lying about.
MultiStorageClientFeature.disable()
