"""The database schema as numbered steps, and how to apply them safely.

All apps share one set of tables. The column `namespace` tells them apart, and it comes first in
every index. With one schema per namespace, apps would be separated a little better. But each app
would need the right to create schemas. Each migration would run once per app. The server would
cache every statement once per app.
"""

from __future__ import annotations

from textwrap import dedent
from typing import TYPE_CHECKING

from qtasks_core.errors import ConfigurationError

if TYPE_CHECKING:
    from asyncpg import Connection

DEFAULT = "qtasks"
"""The name of the schema, unless an option says otherwise."""

# The wire format of a record is a byte and a MessagePack map, see `qtasks_core.wire`. These
# functions turn it into JSON for people. What JSON does not have is shown as text: bytes in base64,
# a value with a tag as the text or the list behind the tag.
SHOW = r"""
    CREATE FUNCTION qtasks.number_at(data bytea, start integer, size integer) RETURNS numeric
    LANGUAGE plpgsql IMMUTABLE STRICT AS $$
    DECLARE
        number numeric := 0;
    BEGIN
        FOR at IN start .. start + size - 1 LOOP
            number := number * 256 + get_byte(data, at);
        END LOOP;
        RETURN number;
    END $$;

    CREATE FUNCTION qtasks.float_at(data bytea, start integer, size integer) RETURNS jsonb
    LANGUAGE plpgsql IMMUTABLE STRICT AS $$
    DECLARE
        bits bigint := (qtasks.number_at(data, start, size) % 9223372036854775808)::bigint;
        fraction integer := CASE size WHEN 4 THEN 23 ELSE 52 END;
        bias integer := CASE size WHEN 4 THEN 127 ELSE 1023 END;
        sign float8 := CASE WHEN get_byte(data, start) > 127 THEN -1 ELSE 1 END;
        exponent integer;
        part float8;
    BEGIN
        IF size = 4 THEN
            bits := bits & 2147483647;
        END IF;
        exponent := (bits >> fraction)::integer;
        part := (bits & ((1::bigint << fraction) - 1))::float8 / (1::bigint << fraction)::float8;
        IF exponent = 2 * bias + 1 THEN
            RETURN to_jsonb(CASE WHEN part > 0 THEN 'NaN' WHEN sign > 0 THEN 'Infinity'
                            ELSE '-Infinity' END);
        ELSIF exponent = 0 THEN
            RETURN to_jsonb(CASE WHEN part = 0 THEN 0::float8
                            ELSE sign * part * power(2::float8, 1 - bias) END);
        END IF;
        RETURN to_jsonb(sign * (1 + part) * power(2::float8, exponent - bias));
    END $$;

    CREATE FUNCTION qtasks.text_of(data bytea) RETURNS text
    LANGUAGE sql IMMUTABLE STRICT AS $$
        SELECT CASE WHEN position('\x00'::bytea IN data) > 0 THEN encode(data, 'escape')
               ELSE convert_from(data, 'UTF8') END
    $$;

    CREATE FUNCTION qtasks.unpack(data bytea, start integer, OUT value jsonb, OUT after integer)
    LANGUAGE plpgsql IMMUTABLE STRICT AS $$
    DECLARE
        tag integer := get_byte(data, start);
        kind text;
        size integer := 0;
        count integer := 0;
        item record;
        name text;
    BEGIN
        after := start + 1;
        IF tag < 128 THEN
            value := to_jsonb(tag);
            RETURN;
        ELSIF tag >= 224 THEN
            value := to_jsonb(tag - 256);
            RETURN;
        ELSIF tag = 192 THEN
            value := 'null';
            RETURN;
        ELSIF tag IN (194, 195) THEN
            value := to_jsonb(tag = 195);
            RETURN;
        ELSIF tag IN (202, 203) THEN
            size := CASE tag WHEN 202 THEN 4 ELSE 8 END;
            value := qtasks.float_at(data, after, size);
            after := after + size;
            RETURN;
        ELSIF tag BETWEEN 204 AND 211 THEN
            size := 1 << (tag % 4);
            value := to_jsonb(qtasks.number_at(data, after, size) - CASE
                WHEN tag >= 208 AND get_byte(data, after) > 127
                THEN trunc(power(256::numeric, size)) ELSE 0 END);
            after := after + size;
            RETURN;
        END IF;
        kind := CASE
            WHEN tag < 144 OR tag IN (222, 223) THEN 'map'
            WHEN tag < 160 OR tag IN (220, 221) THEN 'list'
            WHEN tag < 192 OR tag BETWEEN 217 AND 219 THEN 'text'
            WHEN tag BETWEEN 196 AND 198 THEN 'bytes'
            ELSE 'tagged' END;
        IF tag < 160 THEN
            count := tag & 15;
        ELSIF tag < 192 THEN
            count := tag & 31;
        ELSIF tag BETWEEN 212 AND 216 THEN
            count := 1 << (tag - 212);
        ELSE
            size := CASE WHEN tag IN (196, 199, 217) THEN 1 WHEN tag IN (197, 200, 218, 220, 222)
                    THEN 2 ELSE 4 END;
            count := qtasks.number_at(data, after, size)::integer;
            after := after + size;
        END IF;
        IF kind = 'tagged' THEN
            -- A tuple or a set is a packed list, everything else is a text.
            tag := get_byte(data, after);
            after := after + 1;
            IF tag IN (1, 2, 3) THEN
                value := (qtasks.unpack(data, after)).value;
            ELSIF tag < 12 THEN
                value := to_jsonb(qtasks.text_of(substr(data, after + 1, count)));
            ELSE
                value := to_jsonb(encode(substr(data, after + 1, count), 'base64'));
            END IF;
            after := after + count;
        ELSIF kind = 'text' THEN
            value := to_jsonb(qtasks.text_of(substr(data, after + 1, count)));
            after := after + count;
        ELSIF kind = 'bytes' THEN
            value := to_jsonb(encode(substr(data, after + 1, count), 'base64'));
            after := after + count;
        ELSIF kind = 'list' THEN
            value := '[]';
            FOR at IN 1 .. count LOOP
                item := qtasks.unpack(data, after);
                value := value || jsonb_build_array(item.value);
                after := item.after;
            END LOOP;
        ELSE
            value := '{}';
            FOR at IN 1 .. count LOOP
                item := qtasks.unpack(data, after);
                name := item.value #>> '{}';
                item := qtasks.unpack(data, item.after);
                value := value || jsonb_build_object(coalesce(name, 'null'), item.value);
                after := item.after;
            END LOOP;
        END IF;
    END $$;

    CREATE FUNCTION qtasks.shown(packed jsonb, encoding text) RETURNS jsonb
    LANGUAGE plpgsql IMMUTABLE AS $$
    DECLARE
        data bytea := decode(packed #>> '{}', 'base64');
    BEGIN
        IF length(data) > 100000 THEN
            RETURN to_jsonb(length(data) || ' bytes');
        ELSIF encoding = 'json' THEN
            RETURN convert_from(data, 'UTF8')::jsonb;
        ELSIF encoding = 'msgpack' AND length(data) > 0 THEN
            RETURN (qtasks.unpack(data, 0)).value;
        END IF;
        RETURN packed;
    EXCEPTION WHEN OTHERS THEN
        RETURN packed;
    END $$;

    CREATE FUNCTION qtasks.as_json(data bytea) RETURNS jsonb
    LANGUAGE plpgsql IMMUTABLE STRICT AS $$
    DECLARE
        found jsonb;
        name text;
    BEGIN
        IF get_byte(data, 0) <> 1 THEN
            RETURN NULL;
        END IF;
        found := (qtasks.unpack(data, 1)).value;
        FOREACH name IN ARRAY ARRAY['args', 'kwargs', 'returning'] LOOP
            IF jsonb_typeof(found -> name) = 'string' THEN
                found := jsonb_set(found, ARRAY[name], qtasks.shown(
                    found -> name, coalesce(found ->> 'encoding', 'msgpack')));
            END IF;
        END LOOP;
        RETURN found;
    EXCEPTION WHEN OTHERS THEN
        RETURN NULL;
    END $$;

    CREATE FUNCTION qtasks.expiry_of(data bytea) RETURNS float8
    LANGUAGE plpgsql STABLE STRICT AS $$
    DECLARE
        task jsonb := qtasks.as_json(data);
    BEGIN
        RETURN coalesce((task ->> 'finished_at')::float8, extract(epoch FROM now()))
            + nullif(coalesce((task ->> 'retention')::float8, 604800), 'Infinity');
    END $$;
"""

# For triggers and other languages. It writes what a client writes: the message, the record, and the
# notification at the commit. All lengths and integers have their longest form.
ENQUEUE = r"""
    CREATE FUNCTION qtasks.pack_text(value text) RETURNS bytea LANGUAGE sql IMMUTABLE STRICT AS $$
        SELECT '\xdb'::bytea || int4send(octet_length(convert_to(value, 'UTF8')))
            || convert_to(value, 'UTF8')
    $$;
    CREATE FUNCTION qtasks.pack_bytes(value bytea) RETURNS bytea LANGUAGE sql IMMUTABLE STRICT AS $$
        SELECT '\xc6'::bytea || int4send(octet_length(value)) || value
    $$;

    CREATE FUNCTION qtasks.pack(value jsonb) RETURNS bytea
    LANGUAGE plpgsql IMMUTABLE STRICT AS $$
    DECLARE
        number numeric;
        parts bytea;
        count integer;
    BEGIN
        CASE jsonb_typeof(value)
            WHEN 'null' THEN
                RETURN '\xc0'::bytea;
            WHEN 'boolean' THEN
                RETURN CASE WHEN value::boolean THEN '\xc3'::bytea ELSE '\xc2'::bytea END;
            WHEN 'string' THEN
                RETURN qtasks.pack_text(value #>> '{}');
            WHEN 'number' THEN
                number := value::numeric;
                IF number <> trunc(number) OR position('.' IN number::text) > 0 THEN
                    RETURN '\xcb'::bytea || float8send(number::float8);
                END IF;
                RETURN '\xd3'::bytea || int8send(number::bigint);
            WHEN 'array' THEN
                SELECT count(*), coalesce(string_agg(qtasks.pack(item), ''::bytea ORDER BY at), '')
                INTO count, parts FROM jsonb_array_elements(value) WITH ORDINALITY AS a (item, at);
                RETURN '\xdd'::bytea || int4send(count) || parts;
            ELSE
                SELECT count(*), coalesce(string_agg(
                    qtasks.pack_text(o.key) || qtasks.pack(o.value), ''::bytea ORDER BY o.key), '')
                INTO count, parts FROM jsonb_each(value) AS o;
                RETURN '\xdf'::bytea || int4send(count) || parts;
        END CASE;
    END $$;

    CREATE FUNCTION qtasks.enqueue(
        app text, task_name text, args jsonb DEFAULT '[]', kwargs jsonb DEFAULT '{}',
        queue text DEFAULT 'default', priority integer DEFAULT 5, delay float8 DEFAULT 0,
        uuid text DEFAULT NULL
    ) RETURNS text LANGUAGE plpgsql AS $$
    #variable_conflict use_variable
    DECLARE
        name CONSTANT text := '^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$';
        home CONSTANT text := trim(BOTH '".' FROM 'qtasks.');
        now CONSTANT float8 := extract(epoch FROM clock_timestamp());
        due CONSTANT boolean := delay > 0;
        fields bytea;
        scope bytea;
    BEGIN
        IF app !~ name OR queue !~ name THEN
            RAISE EXCEPTION '% or % cannot be the name of an app or a queue', app, queue;
        ELSIF length(task_name) NOT BETWEEN 1 AND 200 OR priority NOT BETWEEN 0 AND 9
            OR delay NOT BETWEEN 0 AND 3e9
            OR jsonb_typeof(args) <> 'array' OR jsonb_typeof(kwargs) <> 'object' THEN
            RAISE EXCEPTION 'wrong arguments: task_name has 1 to 200 characters, priority is 0 to '
                '9, delay 0 to 3e9, args a JSON array, kwargs a JSON object';
        END IF;
        uuid := coalesce(uuid, gen_random_uuid()::text);
        fields := qtasks.pack_text('uuid') || qtasks.pack_text(uuid)
            || qtasks.pack_text('task_name') || qtasks.pack_text(task_name)
            || qtasks.pack_text('queue') || qtasks.pack_text(queue)
            || qtasks.pack_text('args') || qtasks.pack_bytes(
                CASE WHEN args = '[]' THEN ''::bytea ELSE qtasks.pack(args) END)
            || qtasks.pack_text('kwargs') || qtasks.pack_bytes(
                CASE WHEN kwargs = '{}' THEN ''::bytea ELSE qtasks.pack(kwargs) END)
            || qtasks.pack_text('priority') || qtasks.pack(to_jsonb(priority))
            || qtasks.pack_text('created_at') || '\xcb'::bytea || float8send(now);
        INSERT INTO qtasks.records (
            namespace, uuid, progress, execution, status, task_name, queue, created_at, remarkable,
            record
        ) VALUES (
            app, uuid, CASE WHEN due THEN 9 ELSE 8 END, '',
            CASE WHEN due THEN 'scheduled' ELSE 'new' END, task_name, queue, now,
            CASE WHEN due THEN 'scheduled' END,
            '\x01df'::bytea || int4send(CASE WHEN due THEN 9 ELSE 8 END) || fields
                || qtasks.pack_text('status')
                || qtasks.pack_text(CASE WHEN due THEN 'scheduled' ELSE 'new' END)
                || CASE WHEN due THEN qtasks.pack_text('due_at') || '\xcb'::bytea
                    || float8send(now + delay) ELSE '' END
        );
        INSERT INTO qtasks.messages (namespace, queue, priority, wake_at, body) VALUES (
            app, queue, priority,
            CASE WHEN due THEN clock_timestamp() + delay * interval '1 second' END,
            '\x01df'::bytea || int4send(8) || fields
                || qtasks.pack_text('delay') || '\xcb'::bytea || float8send(delay)
        );
        scope := convert_to(app, 'UTF8') || '\x00'::bytea || convert_to(queue, 'UTF8');
        IF home <> 'qtasks' THEN
            scope := convert_to(home, 'UTF8') || '\x00'::bytea || scope;
        END IF;
        PERFORM pg_notify('qtasks:' || left(encode(sha256(scope), 'hex'), 40), '');
        RETURN uuid;
    END $$;
"""

LOCK = 0x7174_6173_6B73
"""The advisory lock that lets one client at a time change the schema ("qtasks" in ASCII)."""

# `wake_at` is a message's complete state. NULL means that it was published without a delay and was
# never received. Otherwise it is the time from which the message may be received: when its delay or
# its lease finishes, or when it was released. Each partial index covers one of the two cases. So a
# backlog does not slow down delayed messages, and delayed messages do not slow down a backlog. New
# entries are at the end of both indexes: see `floors`. `delivery` counts the deliveries and is half
# of the fence.
#
# Every message is deleted soon, and a receiver scans the index entries of deleted rows until they
# are vacuumed. So vacuum starts after a fixed number of dead rows, not after a share of the table.
# It does not pause. Half-empty pages keep the new version of a leased row beside the old one.
#
# A new version of a record changes no indexed column. So if its page has room, it needs no new
# index entry. The final record is half as large again as the first one, so two thirds of each page
# are left for it. Therefore no index has the status or the expiry of a record:
# - `remarkable` is the status, but NULL for `new` and `success`. So it changes only for the few
#   records that a list by status should find at once.
# - `expiries` has one row for all records of one save that expire in the same second.
# - `records_listed` serves all other lists, from the newest record on: a query merges the queues
#   and task names that it finds in the index (see `listing`).
#
# The primary key must be the newest index of its table. In an empty table, and for an app that the
# statistics do not know yet, the planner expects no row, so all indexes that begin with `namespace`
# cost the same. It then takes the newest one. A search for a uuid in another index would read all
# entries of the app.
#
# `progress` is `qtasks_core.records.order_of`. The other columns repeat values of `record` that
# queries filter by. A row without a record only holds `watchers`: the inboxes that asked for a task
# before its first save.
#
# `streams` counts the items of each stream, under a lock, so that positions rise in the order of
# the commits.
STEPS = (
    """
    CREATE TABLE qtasks.messages (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        wake_at timestamptz,
        delivery integer NOT NULL DEFAULT 0,
        priority smallint NOT NULL,
        namespace text COLLATE "C" NOT NULL,
        queue text COLLATE "C" NOT NULL,
        body bytea NOT NULL
    ) WITH (
        fillfactor = 60,
        autovacuum_vacuum_scale_factor = 0,
        autovacuum_vacuum_threshold = 20000,
        autovacuum_vacuum_cost_delay = 0,
        toast.autovacuum_vacuum_scale_factor = 0,
        toast.autovacuum_vacuum_threshold = 20000,
        toast.autovacuum_vacuum_cost_delay = 0
    );
    CREATE INDEX messages_ready ON qtasks.messages (namespace, queue, priority, id)
        WHERE wake_at IS NULL;
    CREATE INDEX messages_waiting ON qtasks.messages (namespace, queue, wake_at)
        WHERE wake_at IS NOT NULL;

    CREATE TABLE qtasks.records (
        progress bigint NOT NULL,
        created_at double precision NOT NULL,
        namespace text COLLATE "C" NOT NULL,
        uuid text COLLATE "C" NOT NULL,
        execution text COLLATE "C",
        status text COLLATE "C",
        task_name text COLLATE "C",
        queue text COLLATE "C",
        dead text COLLATE "C",
        reply_to text,
        watchers text[],
        record bytea,
        PRIMARY KEY (namespace, uuid)
    ) WITH (
        fillfactor = 60,
        autovacuum_vacuum_scale_factor = 0.05,
        autovacuum_vacuum_cost_delay = 0,
        toast.autovacuum_vacuum_scale_factor = 0.05,
        toast.autovacuum_vacuum_cost_delay = 0
    );
    """,
    """
    DROP INDEX qtasks.messages_waiting;
    CREATE INDEX messages_due ON qtasks.messages (namespace, queue, priority, wake_at)
        WHERE wake_at IS NOT NULL;

    CREATE TABLE qtasks.floors (
        ready bigint NOT NULL,
        due timestamptz NOT NULL,
        priority smallint NOT NULL,
        namespace text COLLATE "C" NOT NULL,
        queue text COLLATE "C" NOT NULL,
        PRIMARY KEY (namespace, queue, priority)
    ) WITH (fillfactor = 60);
    """,
    SHOW
    + ENQUEUE
    + """
    ALTER TABLE qtasks.records
        SET (fillfactor = 45),
        ADD COLUMN expires_at double precision,
        ADD COLUMN remarkable text COLLATE "C";

    CREATE TABLE qtasks.expiries (
        id bigint GENERATED ALWAYS AS IDENTITY,
        expires_at double precision NOT NULL,
        namespace text COLLATE "C" NOT NULL,
        uuids text[] NOT NULL,
        PRIMARY KEY (namespace, expires_at, id)
    );
    CREATE TABLE qtasks.values (
        namespace text COLLATE "C" NOT NULL,
        key text COLLATE "C" NOT NULL,
        value bytea NOT NULL,
        PRIMARY KEY (namespace, key)
    ) WITH (fillfactor = 60);
    CREATE TABLE qtasks.claims (
        expires_at timestamptz NOT NULL,
        namespace text COLLATE "C" NOT NULL,
        key text COLLATE "C" NOT NULL,
        owner text COLLATE "C" NOT NULL,
        PRIMARY KEY (namespace, key)
    ) WITH (fillfactor = 60);
    CREATE TABLE qtasks.streams (
        last bigint NOT NULL,
        created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        namespace text COLLATE "C" NOT NULL,
        uuid text COLLATE "C" NOT NULL,
        PRIMARY KEY (namespace, uuid)
    ) WITH (fillfactor = 60);
    CREATE INDEX streams_oldest ON qtasks.streams (namespace, created_at);
    CREATE TABLE qtasks.items (
        position bigint NOT NULL,
        namespace text COLLATE "C" NOT NULL,
        uuid text COLLATE "C" NOT NULL,
        data bytea NOT NULL,
        PRIMARY KEY (namespace, uuid, position)
    );

    UPDATE qtasks.records SET
        remarkable = CASE WHEN status NOT IN ('new', 'success') THEN status END,
        expires_at = CASE WHEN progress & 7 >= 4 THEN qtasks.expiry_of(record) END
    WHERE record IS NOT NULL AND (progress & 7 NOT IN (0, 4) OR progress & 7 >= 4);
    INSERT INTO qtasks.expiries (namespace, expires_at, uuids)
        SELECT namespace, max(expires_at), array_agg(uuid) FROM qtasks.records
        WHERE expires_at IS NOT NULL GROUP BY namespace, floor(expires_at);
    DROP FUNCTION qtasks.expiry_of(bytea);

    CREATE VIEW qtasks.tasks AS
        SELECT namespace AS app, uuid, task_name, queue, status, progress >> 3 AS attempt,
               CASE WHEN created_at BETWEEN 0 AND 2e11 THEN to_timestamp(created_at) END
                   AS created_at,
               CASE WHEN expires_at BETWEEN 0 AND 2e11 THEN to_timestamp(expires_at) END
                   AS expires_at,
               dead, qtasks.as_json(record) AS record
        FROM qtasks.records WHERE record IS NOT NULL;
    CREATE VIEW qtasks.queued AS
        SELECT namespace AS app, queue, priority, id, wake_at, delivery AS deliveries,
               qtasks.as_json(body) AS message
        FROM qtasks.messages;

    CREATE INDEX records_listed ON qtasks.records (namespace, queue, task_name, created_at, uuid);
    CREATE INDEX records_remarkable ON qtasks.records (namespace, remarkable, created_at, uuid)
        WHERE remarkable IS NOT NULL;
    """,
    """
    ALTER TABLE qtasks.messages ADD COLUMN published_at timestamptz;
    ALTER TABLE qtasks.messages ALTER COLUMN published_at SET DEFAULT statement_timestamp();
    ALTER TABLE qtasks.records
        DROP COLUMN reply_to,
        SET (fillfactor = 35),
        DROP CONSTRAINT records_pkey,
        ADD PRIMARY KEY (namespace, uuid);
    ALTER TABLE qtasks.streams
        DROP CONSTRAINT streams_pkey,
        ADD PRIMARY KEY (namespace, uuid);
    """,
)
VERSION = len(STEPS)


def named(sql: str, schema: str) -> str:
    """Return a statement for the tables of `schema`. It is written for those of `qtasks`."""
    return sql if schema == DEFAULT else sql.replace("qtasks.", f'"{schema}".')


async def ensure_schema(connection: Connection, schema: str = DEFAULT) -> list[str]:
    """Create or update the tables. Return the changes, in words.

    If the tables are up to date, this does nothing and needs no rights.

    Raises `ConfigurationError` if a newer release has changed the schema.
    """
    if await version_of(connection, schema) == VERSION:
        return []
    # Inside a caller's open transaction, this is a savepoint.
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK)
        found = await version_of(connection, schema)
        for statement in steps_from(found, schema):
            await connection.execute(statement)
    if found == VERSION:
        return []  # another client did it while this one waited for the lock
    if found == 0:
        return [f"the schema {schema} created, now has version {VERSION}"]
    return [f"the schema {schema} updated from version {found} to {VERSION}"]


def steps_from(found: int, schema: str) -> list[str]:
    """Return the statements that bring the tables from a version to this release's version.

    Raises `ConfigurationError` if a newer release has changed the schema.
    """
    if found > VERSION:
        raise ConfigurationError(
            f"the schema {schema} has version {found}, this release knows up to {VERSION}: "
            "upgrade qtasks here, or use another database"
        )
    if found == VERSION:
        return []
    statements = [*STEPS[found:], f"UPDATE qtasks.version SET version = {VERSION};"]
    if found == 0:
        statements[:0] = [
            f'CREATE SCHEMA IF NOT EXISTS "{schema}";',
            "CREATE TABLE qtasks.version (version integer NOT NULL);",
            "INSERT INTO qtasks.version VALUES (0);",
        ]
    return [named(dedent(statement).strip(), schema) for statement in statements]


async def version_of(connection: Connection, schema: str) -> int:
    """Return the version of the schema in the database, 0 if it does not exist."""
    # to_regclass would use the session's cache, which waiting for a lock does not refresh.
    there = await connection.fetchval(
        "SELECT true FROM pg_tables WHERE schemaname = $1 AND tablename = 'version'", schema
    )
    if not there:
        return 0
    version: int = await connection.fetchval(named("SELECT version FROM qtasks.version", schema))
    return version
