"""All sections of a run's settings as one table of keys, without what checks them together.

Neither torch nor strategies are imported: a command's help reads the keys from here.
"""

from corolla.config.adapter import Adapter
from corolla.config.compression import Compression
from corolla.config.dataset import Dataset
from corolla.config.defence import Defence
from corolla.config.evaluation import Evaluation
from corolla.config.machine import Machine
from corolla.config.population import Population
from corolla.config.privacy import Privacy
from corolla.config.subject import Subject
from corolla.config.training import Training


class Settings(  # from the last section to the first: pydantic takes their keys in this order
    Machine,
    Evaluation,
    Privacy,
    Defence,
    Compression,
    Training,
    Adapter,
    Dataset,
    Population,
    Subject,
):
    """All keys of a run."""
