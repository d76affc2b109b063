"""permjax: permutation symmetries of JAX models, found, used and checked."""

from permjax.action import permute as permute
from permjax.action import permute_state as permute_state
from permjax.lmc.barrier import Barrier as Barrier
from permjax.lmc.barrier import barrier as barrier
from permjax.lmc.barrier import l2_distance as l2_distance
from permjax.lmc.barrier import l2_reduction_percent as l2_reduction_percent
from permjax.match.activations import ActivationMatching as ActivationMatching
from permjax.match.activations import activation_matching as activation_matching
from permjax.match.weights import WeightMatching as WeightMatching
from permjax.match.weights import weight_matching as weight_matching
from permjax.merge.average import Average as Average
from permjax.merge.average import Slerp as Slerp
from permjax.merge.average import average as average
from permjax.merge.average import slerp as slerp
from permjax.merge.repair import Repair as Repair
from permjax.merge.repair import reestimate_statistics as reestimate_statistics
from permjax.merge.repair import repair as repair
from permjax.permutation import Permutations as Permutations
from permjax.permutation import as_matrix as as_matrix
from permjax.permutation import compose as compose
from permjax.permutation import identity as identity
from permjax.permutation import invert as invert
from permjax.permutation import random_permutations as random_permutations
from permjax.plan import Plan as Plan
from permjax.steps import MergeState as MergeState
from permjax.steps import Result as Result
from permjax.steps import chain as chain
from permjax.symmetry.capture import capture as capture
from permjax.symmetry.spec import PermutationSpec as PermutationSpec
from permjax.symmetry.trace import trace_spec as trace_spec
from permjax.symmetry.verify import SpecError as SpecError
from permjax.symmetry.verify import equivalence_error as equivalence_error
from permjax.symmetry.verify import verify as verify

__version__ = "0.1.0"
