"""The names of transformers that this project uses, for type checkers alone.

The library's own __init__ imports all its models by *, so that a type checker reads 2,500 files,
a third of its time. The types are the library's.
"""

from transformers.modeling_utils import PreTrainedModel as PreTrainedModel
from transformers.models.auto.tokenization_auto import AutoTokenizer as AutoTokenizer
from transformers.models.bart.tokenization_bart import BartTokenizer as BartTokenizer
from transformers.models.bert.tokenization_bert import BertTokenizer as BertTokenizer
from transformers.models.blip.configuration_blip import BlipConfig as BlipConfig
from transformers.models.blip.image_processing_pil_blip import (
    BlipImageProcessorPil as BlipImageProcessorPil,
)
from transformers.models.blip.modeling_blip import (
    BlipForConditionalGeneration as BlipForConditionalGeneration,
)
from transformers.models.blip.processing_blip import BlipProcessor as BlipProcessor
from transformers.models.clip.configuration_clip import CLIPTextConfig as CLIPTextConfig
from transformers.models.clip.configuration_clip import CLIPVisionConfig as CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import (
    CLIPImageProcessorPil as CLIPImageProcessorPil,
)
from transformers.models.clip.modeling_clip import CLIPTextModel as CLIPTextModel
from transformers.models.clip.modeling_clip import (
    CLIPVisionModelWithProjection as CLIPVisionModelWithProjection,
)
from transformers.models.clip.tokenization_clip import CLIPTokenizer as CLIPTokenizer
from transformers.models.florence2.configuration_florence2 import (
    Florence2Config as Florence2Config,
)
from transformers.models.florence2.modeling_florence2 import (
    Florence2ForConditionalGeneration as Florence2ForConditionalGeneration,
)
from transformers.models.florence2.processing_florence2 import (
    Florence2Processor as Florence2Processor,
)
