"""All architectures of image and video models whose names are known, one file each."""

from pcb_peft.images.anima import ANIMA
from pcb_peft.images.architecture import Architecture
from pcb_peft.images.flux import FLUX
from pcb_peft.images.flux2 import FLUX2
from pcb_peft.images.hidream import HIDREAM
from pcb_peft.images.hunyuan_video import HUNYUAN_VIDEO
from pcb_peft.images.krea2 import KREA2
from pcb_peft.images.ltx_video import LTX_VIDEO
from pcb_peft.images.lumina2 import LUMINA2
from pcb_peft.images.qwen_image import QWEN_IMAGE
from pcb_peft.images.stable_diffusion import SD1, SD2, SDXL
from pcb_peft.images.stable_diffusion_3 import SD3
from pcb_peft.images.wan import WAN
from pcb_peft.images.z_image import Z_IMAGE

ARCHITECTURES: tuple[Architecture, ...] = (
    *(SD1, SD2, SDXL, SD3, FLUX, FLUX2),
    *(QWEN_IMAGE, Z_IMAGE, WAN, HUNYUAN_VIDEO, LTX_VIDEO),
    *(HIDREAM, LUMINA2, ANIMA, KREA2),
)
"""All architectures whose names are known."""

__all__ = ["ARCHITECTURES", "Architecture"]
