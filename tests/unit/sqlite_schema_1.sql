CREATE TABLE qtasks_schema (version INTEGER NOT NULL);
CREATE TABLE qtasks_namespaces (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE qtasks_queues (
    id INTEGER PRIMARY KEY, namespace INTEGER NOT NULL, name TEXT NOT NULL, UNIQUE (namespace, name)
);
CREATE TABLE qtasks_messages (
    id INTEGER PRIMARY KEY,
    queue INTEGER NOT NULL,
    priority INTEGER NOT NULL,
    wake_at REAL,
    holder INTEGER NOT NULL,
    count INTEGER NOT NULL,
    data BLOB NOT NULL
);
CREATE INDEX qtasks_ready ON qtasks_messages (queue, priority DESC, id) WHERE wake_at IS NULL;
CREATE INDEX qtasks_waiting ON qtasks_messages (queue, wake_at) WHERE wake_at IS NOT NULL;
CREATE TABLE qtasks_records (
    namespace INTEGER NOT NULL,
    uuid TEXT NOT NULL,
    ord INTEGER NOT NULL,
    execution TEXT NOT NULL,
    task_name TEXT NOT NULL,
    queue TEXT NOT NULL,
    created_at REAL NOT NULL,
    dead INTEGER NOT NULL,
    expires_at REAL,
    data BLOB NOT NULL,
    PRIMARY KEY (namespace, uuid)
) WITHOUT ROWID;
CREATE TABLE qtasks_watchers (
    namespace INTEGER NOT NULL, uuid TEXT NOT NULL, address TEXT NOT NULL,
    PRIMARY KEY (namespace, uuid, address)
) WITHOUT ROWID;
INSERT INTO qtasks_schema VALUES (1);
