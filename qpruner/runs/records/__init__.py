"""What the stages leave behind: small JSON records of plain data.

A record vouches for the files of its stage and carries the figures that the report shows. `digest` is the digest of
everything the stage depended on; a stage whose record has the digest it would use now is skipped.
"""

from qpruner.runs.records.base import RUN_ID as RUN_ID
from qpruner.runs.records.base import Record as Record
from qpruner.runs.records.base import Recorded as Recorded
from qpruner.runs.records.base import StandardError as StandardError
from qpruner.runs.records.base import digest_of as digest_of
from qpruner.runs.records.base import flat as flat
from qpruner.runs.records.evaluation import CandidateRecord as CandidateRecord
from qpruner.runs.records.evaluation import ComparisonRecord as ComparisonRecord
from qpruner.runs.records.evaluation import EvalRecord as EvalRecord
from qpruner.runs.records.evaluation import FinetuneRecord as FinetuneRecord
from qpruner.runs.records.evaluation import Inference as Inference
from qpruner.runs.records.evaluation import InferenceSetting as InferenceSetting
from qpruner.runs.records.evaluation import MetricScore as MetricScore
from qpruner.runs.records.evaluation import RowScores as RowScores
from qpruner.runs.records.evaluation import TaskScore as TaskScore
from qpruner.runs.records.run import MARK as MARK
from qpruner.runs.records.run import ExportRecord as ExportRecord
from qpruner.runs.records.run import Results as Results
from qpruner.runs.records.run import RunState as RunState
from qpruner.runs.records.run import SearchState as SearchState
from qpruner.runs.records.run import StageState as StageState
from qpruner.runs.records.search import GIVEN as GIVEN
from qpruner.runs.records.search import Begun as Begun
from qpruner.runs.records.search import Confirmation as Confirmation
from qpruner.runs.records.search import FinalistScore as FinalistScore
from qpruner.runs.records.search import FreshScore as FreshScore
from qpruner.runs.records.search import FrontPoint as FrontPoint
from qpruner.runs.records.search import KeptScore as KeptScore
from qpruner.runs.records.search import RungResult as RungResult
from qpruner.runs.records.search import SearchClock as SearchClock
from qpruner.runs.records.search import SearchRecord as SearchRecord
from qpruner.runs.records.search import TrialPulse as TrialPulse
from qpruner.runs.records.search import TrialRecord as TrialRecord
from qpruner.runs.records.stages import BankRecord as BankRecord
from qpruner.runs.records.stages import LayerWidths as LayerWidths
from qpruner.runs.records.stages import MethodScores as MethodScores
from qpruner.runs.records.stages import PrepareRecord as PrepareRecord
from qpruner.runs.records.stages import PruneRecord as PruneRecord
from qpruner.runs.records.stages import SensitivityRecord as SensitivityRecord
from qpruner.runs.records.stages import plan_group_bytes as plan_group_bytes
