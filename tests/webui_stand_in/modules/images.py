"""modules.images: saves a picture under the next number."""

from pathlib import Path


def save_image(image, path, basename, seed=None, prompt=None, extension="png", info=None, short_filename=False,
               no_prompt=False, grid=False, pnginfo_section_name="parameters", p=None, existing_info=None,
               forced_filename=None, suffix="", save_to_dirs=None):
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    name = folder / f"{len(list(folder.iterdir())):05}-{seed}{suffix}.{extension}"
    image.save(name)
    return str(name), None
