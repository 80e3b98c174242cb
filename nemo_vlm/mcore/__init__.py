"""Everything that touches Megatron-Core. No other package imports it."""

import warnings

from nemo_vlm.mcore import cpu

# Megatron tells at import, module by module, that Apex and Transformer Engine are missing; mcore.layers decides.
for message in (
    "Apex is not installed",
    "transformer_engine not found",
    ".*Falling back to Torch",
    ".*cuda.*not available",
):
    warnings.filterwarnings("ignore", message)

cpu.import_megatron()
