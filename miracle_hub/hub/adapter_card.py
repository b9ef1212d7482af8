"""What the card of a compressed adapter says other than that of a model: its base, and how PEFT loads it."""

from pathlib import Path

from miracle_hub.codec.base import is_hub_id
from miracle_hub.codec.config import read_config
from miracle_hub.codec.naming import ADAPTER_CONFIG

# As PEFT names its automatic classes, by task_type.
_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def base_of_adapter(folder: Path) -> str | None:
    """The Hub id of the model that an adapter adapts; None for a local folder, which strangers have not.

    Raises:
        SourceError: adapter_config.json is no JSON object.
    """
    name = read_config(folder, ADAPTER_CONFIG).get("base_model_name_or_path")
    return name if isinstance(name, str) and is_hub_id(name) and not Path(name).exists() else None


def usage_of_adapter(folder: Path, repo_id: str) -> str:
    """Code that loads an adapter with its model.

    Raises:
        SourceError: adapter_config.json is no JSON object.
    """
    task = read_config(folder, ADAPTER_CONFIG).get("task_type")
    name = _CLASSES.get(str(task), "AutoPeftModel")
    return f'from peft import {name}\n\nmodel = {name}.from_pretrained("{repo_id}")'
