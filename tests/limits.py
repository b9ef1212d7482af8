"""How long the tests wait for what should end by itself.

No test measures a machine: on one that does twenty things at once everything takes twenty times as long and
must still pass. Limits are there so that what hangs ends.
"""

# Ten minutes: far more than anything here takes on a loaded machine, and less than a person waits.
HANG_SECONDS = 600

# Of a process's own computing: refusing a file takes under a millisecond, reading what it announces minutes.
AT_ONCE_SECONDS = 30
