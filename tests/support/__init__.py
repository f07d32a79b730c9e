"""What the tests are made with: processes, clients, brokers, plugins of pytest."""
