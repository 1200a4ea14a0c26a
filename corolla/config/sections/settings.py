"""All sections of a run's settings as one table of keys, without what checks them together.

Neither torch nor strategies are imported: a command's help reads the keys from here.
"""

from corolla.config.sections.adapter import Adapter
from corolla.config.sections.compression import Compression
from corolla.config.sections.dataset import Dataset
from corolla.config.sections.defence import Defence
from corolla.config.sections.evaluation import Evaluation
from corolla.config.sections.machine import Machine
from corolla.config.sections.population import Population
from corolla.config.sections.privacy import Privacy
from corolla.config.sections.secure_sums import SecureSums
from corolla.config.sections.sparse_set import SparseSet
from corolla.config.sections.subject import Subject
from corolla.config.sections.training import Training


class Settings(  # from the last section to the first: pydantic takes their keys in this order
    Machine,
    Evaluation,
    SecureSums,
    Privacy,
    Defence,
    Compression,
    Training,
    Adapter,
    SparseSet,
    Dataset,
    Population,
    Subject,
):
    """All keys of a run."""
