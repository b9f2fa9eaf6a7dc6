from mspc.cli import main

main()
