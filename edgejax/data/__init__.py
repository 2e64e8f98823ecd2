"""Text to rows: records from files, tokens, which of them are learned, packing, and an order to resume."""

from edgejax.data.batch import Batch
from edgejax.data.chat import assistant_spans
from edgejax.data.corpora import CORPORA, python_reference
from edgejax.data.dataset import PackedDataset, batch_at, eval_batches, micro_batches, pack_documents
from edgejax.data.documents import Document, encode_records
from edgejax.data.load import Split, check_seq_length, load_documents, load_text
from edgejax.data.sources import ChatRecord, CompletionRecord, Record, TextRecord, read_records
from edgejax.data.split import check_disjoint, split_documents
from edgejax.data.tokenizer import Tokenizer

__all__ = [
    "CORPORA",
    "Batch",
    "ChatRecord",
    "CompletionRecord",
    "Document",
    "PackedDataset",
    "Record",
    "Split",
    "TextRecord",
    "Tokenizer",
    "assistant_spans",
    "batch_at",
    "check_disjoint",
    "check_seq_length",
    "encode_records",
    "eval_batches",
    "load_documents",
    "load_text",
    "micro_batches",
    "pack_documents",
    "python_reference",
    "read_records",
    "split_documents",
]
