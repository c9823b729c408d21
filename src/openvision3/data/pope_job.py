"""The options of `openvision3 data pope`. Nothing here imports torch, so that `--help` stays fast."""

from __future__ import annotations

from dataclasses import dataclass

from openvision3.settings import PathName


@dataclass
class PopeJob:
    """Write questions in POPE's shape about images whose captions or labels name what is in them."""

    out: PathName
    """the folder of NAME_pope_random.json, NAME_pope_popular.json, NAME_pope_adversarial.json and of the images"""
    label_key: str = ""
    """the JSON field or table column with the one object of each image, such as category. Not set: objects named in captions"""
    group_key: str = ""
    """with --label-key: the field whose labels are alike, such as coarse_category: the adversarial questions ask for a label of the same group"""
    objects: PathName = ""
    """the objects to look for in captions, one per line with their other words: person|man|woman. Not set: COCO's 80 and some more"""
    caption_keys: tuple[str, ...] = ()
    """JSON fields of shards that hold captions. Not set: the .txt member"""
    per_image: int = 3
    """questions of each answer for an image: only images with so many objects are asked about. 1 with --label-key"""
    count: int = 500
    """images, drawn from those that have enough objects"""
    seed: int = 0
    """seed of that choice and of the drawn objects"""

    def __post_init__(self):
        for name in ("per_image", "count"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.group_key and not self.label_key:
            raise ValueError("group_key is used with label_key only; leave it out, or name the field of the labels with --label-key")
        if self.label_key:
            self.per_image = 1
