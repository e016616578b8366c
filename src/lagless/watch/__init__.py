"""Follow a run that is being written: averages, their losses, and the best model so far."""

from lagless.watch._follow import Until as Until, follow as follow
from lagless.watch._page import Page as Page
from lagless.watch._plans import CommandPlan as CommandPlan, HeldOutPlan as HeldOutPlan
from lagless.watch._table import Table as Table
from lagless.watch._view import View as View
from lagless.watch._wait import Waiter as Waiter
from lagless.watch._watch import Settings as Settings, Watch as Watch
from lagless.watch._writers import Writer as Writer
