from weightops.cli.main import main

main()
