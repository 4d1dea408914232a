"""Image and text towers: what they are made of, how they run. The only room that knows other
libraries.
"""

from lraee.towers import (
    hugging_face,
    hugging_face_text,
    open_clip,
    open_clip_hf_text,
    open_clip_text,
    openai_clip,
    text,
    timm,
)
from lraee.towers.families import register

register(open_clip.FAMILY)
register(openai_clip.FAMILY)
register(timm.TIMM_MODEL)
register(timm.TRUNK)
for family in hugging_face.FAMILIES:
    register(family)
text.register(open_clip_text.FAMILY)
text.register(open_clip_hf_text.FAMILY)
text.register(hugging_face_text.FAMILY)
