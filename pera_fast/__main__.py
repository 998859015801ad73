"""`python -m pera_fast COMMAND` is `pera-fast COMMAND`."""

from pera_fast._cli import main

main()
