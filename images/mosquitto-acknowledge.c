/* A plugin of Mosquitto 2.1: nothing is acknowledged before it is committed.
 *
 * Mosquitto acknowledges a message at once, while it handles it. Its SQLite persistence commits at the beginning of the next turn of
 * the main loop (with `flush_period 0`), all that came in a turn together. Whoever kills the broker between the two makes it
 * forget what it has acknowledged. So this plugin holds back what is acknowledged in a turn until that turn is committed:
 *
 *   turn 7   reads A: its message is stored; the PUBACK to A is held     turn 8   commits; A's socket can take more: the PUBACK goes
 *            reads B: its message is stored; the PUBACK to B is held              B's too; then A and B are read again
 *
 * No callback of a plugin can do that. Therefore this object is preloaded as well, and stands between Mosquitto and the functions
 * by which it reads and writes its sockets. An acknowledgement that has to wait finds the socket full: Mosquitto keeps such
 * packets in their order, has asked to be told when the socket takes more, and in the next turn writes before it reads.
 *
 *   LD_PRELOAD=/usr/lib/mosquitto/acknowledge.so      in the broker's environment
 *   global_plugin /usr/lib/mosquitto/acknowledge.so   after the persistence plugin
 *
 * Held are PUBACK, PUBREC, PUBCOMP, SUBACK and UNSUBACK, and with one of these what is queued behind it for the same client; only in
 * a turn in which something was stored, and only where that client was read in the same turn: an acknowledgement answers what its
 * own client sent, so that all others stem from turns that are committed. Nobody waits for longer than a turn. A client that
 * is disconnected in the same turn gets no acknowledgement, and no DISCONNECT behind it; it has to send again what it sent.
 *
 * Mosquitto's SQLite persistence takes no notice of what SQLite could not write: it goes on, and what it has stored in that turn is
 * in memory alone. So this object looks at what SQLite answers as well, and where the storage fails, the broker ends before it has
 * acknowledged anything of that turn: as after a kill, its clients send it again.
 *
 * Preloaded alone it does nothing. As a plugin alone it could do nothing, and refuses to start. Not for listeners of WebSockets, whose
 * frames hide what is in them: there Mosquitto is as it was.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <mosquitto.h>
#include <openssl/ssl.h>
#include <sqlite3.h>

#define NAME "acknowledge"
#define NANOSECONDS 1000000000

/* As many as Linux allows a process (fs.nr_open) where nobody has raised it. What lies beyond counts as read in every turn. */
#define MOST_SOCKETS (1 << 20)

/* The function that Mosquitto would call without this one. */
#define NEXT(function) \
	static __typeof__(function) *next; \
	if(!next){ \
		next = (__typeof__(function) *)dlsym(RTLD_NEXT, #function); \
	}

MOSQUITTO_PLUGIN_DECLARE_VERSION(5);

/* Each plugin of that name would find the other's in the global scope: this one is found under no name. */
extern __typeof__(send) own_send __attribute__((alias("send"), visibility("hidden")));

static bool loaded;
/* What was stored before is read, and clients are let in. */
static bool running;
/* When the monotonic clock began, as the time of day was when the broker started; in nanoseconds. */
static int64_t boot;
/* A turn of the main loop begins with the commit of the one before it. */
static uint64_t turn = 1;
static bool uncommitted;
/* By file descriptor. Takes memory for those that are used. */
static uint64_t read_turn[MOST_SOCKETS];
/* Where writing was refused last. */
static _Thread_local const SSL *held;

static void note_read(int socket)
{
	if(socket >= 0 && socket < MOST_SOCKETS){
		read_turn[socket] = turn;
	}
}

static bool was_read(int socket)
{
	return socket < 0 || socket >= MOST_SOCKETS || read_turn[socket] == turn;
}

/* Whether a packet that Mosquitto writes acknowledges something: it writes each by a call of its own. The rest of one that was
 * written in part can look like it, and then waits for a turn too. */
static bool acknowledges(const void *packet, size_t length)
{
	if(length == 0){
		return false;
	}
	switch(*(const unsigned char *)packet & 0xF0){
		case 0x40: /* PUBACK */
		case 0x50: /* PUBREC */
		case 0x70: /* PUBCOMP */
		case 0x90: /* SUBACK */
		case 0xB0: /* UNSUBACK */
			return true;
		default:
			return false;
	}
}

ssize_t read(int file, void *buffer, size_t size)
{
	NEXT(read)
	note_read(file);
	return next(file, buffer, size);
}

ssize_t send(int socket, const void *packet, size_t length, int flags)
{
	NEXT(send)
	if(uncommitted && was_read(socket) && acknowledges(packet, length)){
		errno = EAGAIN;
		return -1;
	}
	return next(socket, packet, length, flags);
}

/* Beside read(): what OpenSSL has read before, and how it reads, is its own affair. */
int SSL_read(SSL *ssl, void *buffer, int size)
{
	NEXT(SSL_read)
	note_read(SSL_get_fd(ssl));
	return next(ssl, buffer, size);
}

int SSL_write(SSL *ssl, const void *packet, int length)
{
	NEXT(SSL_write)
	if(uncommitted && acknowledges(packet, (size_t)length) && was_read(SSL_get_fd(ssl))){
		held = ssl;
		return -1;
	}
	return next(ssl, packet, length);
}

/* Mosquitto asks right after a write that failed. */
int SSL_get_error(const SSL *ssl, int result)
{
	NEXT(SSL_get_error)
	if(held == ssl){
		held = NULL;
		return SSL_ERROR_WANT_WRITE;
	}
	return next(ssl, result);
}

/* Whether the storage has failed. What SQL itself refuses is not the storage's fault, and comes again after each start. */
static bool is_lost(int result)
{
	switch(result & 0xFF){
		case SQLITE_BUSY: /* another process writes there, where none has any business */
		case SQLITE_NOMEM:
		case SQLITE_READONLY:
		case SQLITE_IOERR:
		case SQLITE_CORRUPT:
		case SQLITE_FULL:
		case SQLITE_CANTOPEN:
		case SQLITE_NOTADB:
			return true;
		default:
			return false;
	}
}

/* A connection that only reads may fail: whoever has it sees that. */
static int judge(sqlite3 *database, int result)
{
	if(running && is_lost(result) && sqlite3_db_readonly(database, "main") == 0){
		mosquitto_log_printf(MOSQ_LOG_ERR, NAME ": cannot store what clients have sent (%s, %s): the broker ends before it acknowledges that."
			" Look at the volume of %s", sqlite3_errstr(result), strerror(sqlite3_system_errno(database)), mosquitto_persistence_location());
		_exit(EXIT_FAILURE);
	}
	return result;
}

int sqlite3_step(sqlite3_stmt *statement)
{
	NEXT(sqlite3_step)
	return judge(sqlite3_db_handle(statement), next(statement));
}

int sqlite3_exec(sqlite3 *database, const char *text, int (*row)(void *, int, char **, char **), void *userdata, char **error)
{
	NEXT(sqlite3_exec)
	return judge(database, next(database, text, row, userdata, error));
}

static int64_t nanoseconds(const struct timespec *time)
{
	return (int64_t)time->tv_sec * NANOSECONDS + time->tv_nsec;
}

/* Mosquitto tells whether a tick is due by the time of day. Were the clock set back, nothing would be committed until it has caught up, and
 * nothing acknowledged. So from the start on, the time of day goes on as evenly as the monotonic clock. It stays one of day, for it is
 * also what Mosquitto makes the identifiers of messages from: the time since the boot comes again, at the next boot or on another node.
 * And to the nanosecond, or a broker that starts again at once would give those of its last second again. */
int clock_gettime(clockid_t clock, struct timespec *now)
{
	int64_t of_day;
	int rc;
	NEXT(clock_gettime)

	if(!loaded || clock != CLOCK_REALTIME){
		return next(clock, now);
	}
	rc = next(CLOCK_MONOTONIC, now);
	of_day = boot + nanoseconds(now);
	now->tv_sec = of_day / NANOSECONDS;
	now->tv_nsec = of_day % NANOSECONDS;
	return rc;
}

/* The persistence plugin has just committed. Or it is about to: no callback of a tick writes to a socket. */
static int on_tick(int event, void *event_data, void *userdata)
{
	(void)event;
	(void)event_data;
	(void)userdata;
	turn++;
	uncommitted = false;
	running = true;
	return MOSQ_ERR_SUCCESS;
}

static int on_change(int event, void *event_data, void *userdata)
{
	(void)event;
	(void)event_data;
	(void)userdata;
	uncommitted = true;
	return MOSQ_ERR_SUCCESS;
}

int mosquitto_plugin_init(mosquitto_plugin_id_t *identifier, void **userdata, struct mosquitto_opt *options, int option_count)
{
	static const int changes[] = {
		MOSQ_EVT_PERSIST_BASE_MSG_ADD,
		MOSQ_EVT_PERSIST_BASE_MSG_DELETE,
		MOSQ_EVT_PERSIST_RETAIN_MSG_SET,
		MOSQ_EVT_PERSIST_RETAIN_MSG_DELETE,
		MOSQ_EVT_PERSIST_CLIENT_ADD,
		MOSQ_EVT_PERSIST_CLIENT_DELETE,
		MOSQ_EVT_PERSIST_CLIENT_UPDATE,
		MOSQ_EVT_PERSIST_SUBSCRIPTION_ADD,
		MOSQ_EVT_PERSIST_SUBSCRIPTION_DELETE,
		MOSQ_EVT_PERSIST_CLIENT_MSG_ADD,
		MOSQ_EVT_PERSIST_CLIENT_MSG_DELETE,
		MOSQ_EVT_PERSIST_CLIENT_MSG_UPDATE,
	};
	struct timespec of_day, since_boot;
	int rc;

	(void)userdata;
	(void)options;
	(void)option_count;
	mosquitto_plugin_set_info(identifier, NAME, NULL);
	if(dlsym(RTLD_DEFAULT, "send") != (void *)own_send){
		mosquitto_log_printf(MOSQ_LOG_ERR, NAME ": expected this very file in LD_PRELOAD of the broker's environment; without, messages"
			" would be acknowledged before they are committed");
		return MOSQ_ERR_INVAL;
	}
	if(clock_gettime(CLOCK_REALTIME, &of_day) != 0 || clock_gettime(CLOCK_MONOTONIC, &since_boot) != 0){
		mosquitto_log_printf(MOSQ_LOG_ERR, NAME ": cannot read the clocks: %s", strerror(errno));
		return MOSQ_ERR_ERRNO;
	}
	boot = nanoseconds(&of_day) - nanoseconds(&since_boot);
	loaded = true;
	rc = mosquitto_callback_register(identifier, MOSQ_EVT_TICK, on_tick, NULL, NULL);
	for(size_t i = 0; rc == MOSQ_ERR_SUCCESS && i < sizeof(changes) / sizeof(*changes); i++){
		rc = mosquitto_callback_register(identifier, changes[i], on_change, NULL, NULL);
	}
	return rc;
}

/* Mosquitto itself forgets the callbacks of a plugin that goes. Being preloaded, this is also what any other plugin calls that calls
 * its own by that name (the persistence plugin does where it cannot start). */
int mosquitto_plugin_cleanup(void *userdata, struct mosquitto_opt *options, int option_count)
{
	(void)userdata;
	(void)options;
	(void)option_count;
	return MOSQ_ERR_SUCCESS;
}
