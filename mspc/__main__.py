from mspc.cli.main import main

main()
