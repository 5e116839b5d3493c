"""Where hidden states come from, where they are kept, how they are read."""

from dynamax.data.answers import Answers
from dynamax.data.batch import HiddenBatch
from dynamax.data.corpora import HubText, LocalText
from dynamax.data.fill import fill_store
from dynamax.data.generated import SelfGenerated
from dynamax.data.glosses import Glosses
from dynamax.data.hidden import HiddenStates
from dynamax.data.language import LanguageData, Portion
from dynamax.data.store import Store, StoredDocument
from dynamax.data.text import Corpus, Document, TextSource

__all__ = [
    "Answers",
    "Corpus",
    "Document",
    "Glosses",
    "HiddenBatch",
    "HiddenStates",
    "HubText",
    "LanguageData",
    "LocalText",
    "Portion",
    "SelfGenerated",
    "Store",
    "StoredDocument",
    "TextSource",
    "fill_store",
]
