"""Build hook: the extras of `polyattn`, derived from the repository's folders.

`polyattn[<id>]` is the distribution built from `plugins/<id>` at this very version, so the list of
folders is the only list. In an sdist the folders are absent and the extras come from its metadata.
"""

from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

# What an extra adds beyond the plugin distributions.
PIPELINE = [
    "diffusers>=0.39",
    "transformers>=4.49",
    "accelerate>=1.0",
    "imageio>=2.31",
    "imageio-ffmpeg>=0.5",
    "pillow>=10",
    "ftfy>=6",  # image-to-video and VACE pipelines of Wan fail on prompts without it
]
TESTING = ["pytest>=8"]


class ExtrasHook(MetadataHookInterface):
    def update(self, metadata):
        repository = Path(self.root).parent
        if not (repository / "plugins").is_dir():
            return
        version = (repository / "VERSION").read_text().strip()
        plugins = sorted(
            path.parent.name for path in (repository / "plugins").glob("*/pyproject.toml")
        )
        extras = {name: [f"polyattn-{name}=={version}"] for name in plugins}
        extras["diffusers"] = PIPELINE
        extras["demo"] = [f"polyattn-demo=={version}", f"polyattn-sdpa=={version}", *PIPELINE]
        extras["testing"] = TESTING
        extras["all"] = sorted(
            {need for name in (*plugins, "diffusers", "demo") for need in extras[name]}
        )
        metadata["optional-dependencies"] = extras
