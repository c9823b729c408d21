"""A prompt about an image stands in any chat template as the template takes it: in parts, or as a text."""

import pytest
from tokenizers import Tokenizer, models

from openvision3.networks.text_models import in_template

IN_PARTS = "{% for m in messages %}{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}:"
JOINED, STRIPPED, WRITTEN = (f"{{% for m in messages %}}{{{{ m['content']{more} }}}}{{% endfor %}}:" for more in (" + ' '", ".strip()", ""))


@pytest.mark.parametrize(
    ("template", "text"),
    [(IN_PARTS, "<image>what?:"), (JOINED, "<image>\nwhat? :"), (STRIPPED, "<image>\nwhat?:"), (WRITTEN, "<image>\nwhat?:"), (None, "<image>\nwhat?")],
)
def test_the_image_and_the_prompt_stand_once_in_a_template_of_any_kind(template, text):
    transformers = pytest.importorskip("transformers")
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")), chat_template=template)
    assert in_template(words, "what?", "<image>\nwhat?") == text
