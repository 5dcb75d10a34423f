"""`python -m extproc.demo --socket PATH`: how the supervisor starts the demo provider."""

from extproc.demo.server import main

main()
