# The public names, each once: `__init__.py` loads them from here on first use.
from .drafting import DraftOptions as DraftOptions
from .drafting import train_draft_head as train_draft_head
from .evaluation.judge import calibrate as calibrate
from .evaluation.judge import evaluate as evaluate
from .evaluation.results import Evaluation as Evaluation
from .fit.fit import FitResult as FitResult
from .fit.fit import fit as fit
from .healing.heal import heal as heal
from .healing.method import BridgeOptions as BridgeOptions
from .healing.method import FillOptions as FillOptions
from .items import AnswerItem as AnswerItem
from .items import ChoiceItem as ChoiceItem
from .items import Item as Item
from .items import PromptItem as PromptItem
from .items import builtin_items as builtin_items
from .items import read_items as read_items
from .program_search.matrix import RewardMatrix as RewardMatrix
from .program_search.search import SearchOptions as SearchOptions
from .program_search.search import SearchResult as SearchResult
from .program_search.search import search as search
from .redteam.attack import RedTeam as RedTeam
from .redteam.attack import redteam as redteam
from .suites.evaluate import evaluate_suite as evaluate_suite
from .suites.results import SuiteEvaluation as SuiteEvaluation
from .training.layerwise_training import LayerwiseSettings as LayerwiseSettings
from .training.menu_training import MenuSettings as MenuSettings
from .training.train import train as train

__all__: list[str]
