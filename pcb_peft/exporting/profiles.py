"""All profiles, in the order of the help."""

from pcb_peft.errors import OptionError
from pcb_peft.exporting import gguf_file, image_profiles, mlx_directory
from pcb_peft.exporting.folded_profile import TRANSFORMERS
from pcb_peft.exporting.peft_profiles import PEFT, PORTABLE
from pcb_peft.exporting.profile import Profile
from pcb_peft.plugins.options import did_you_mean

PROFILES: dict[str, Profile] = {
    one.name: one
    for one in (
        *(PORTABLE, PEFT, TRANSFORMERS, gguf_file.PROFILE, mlx_directory.PROFILE),
        *image_profiles.PROFILES,
    )
}


def profile_named(name: str) -> Profile:
    """Return a profile.

    Raises:
        OptionError: There is none of that name.
    """
    if name not in PROFILES:
        raise OptionError(
            f"no profile {name!r}{did_you_mean(name, PROFILES)}; it must be one of {', '.join(PROFILES)}"
        )
    return PROFILES[name]
